#!/usr/bin/env python3
"""Asks Tapio's tables in SQL: python3 docs/sql/tapio_sql.py FOLDER|s3://BUCKET/PREFIX 'SELECT …'

Needs `pip install duckdb pytz`, or `pip install datafusion` with --engine datafusion. Without a query it runs those of
docs/sql.md one after another. It makes the views of docs/sql/views.sql first; from Python, `connect()` returns an engine that
has them. S3 is reached by AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION and AWS_ENDPOINT_URL.
"""

import argparse
import datetime
import decimal
import json
import os
import pathlib
import re
import sys
import urllib.parse

HERE = pathlib.Path(__file__).resolve().parent
TABLES = ("events", "deaths", "curves", "ledger", "findings")


def views():
    text = re.sub(r"--.*", "", (HERE / "views.sql").read_text())
    return [statement for statement in text.split(";") if statement.strip()]


def page_queries():
    """The queries of docs/sql.md, by their headings."""
    found = re.findall(r"^### (.+?)\n(?:(?!^###).)*?^```sql\n(.*?)^```", (HERE.parent / "sql.md").read_text(), re.M | re.S)
    return [(title, query.strip().rstrip(";")) for title, query in found]


class DuckDb:
    def __init__(self, place):
        import duckdb

        self.db = duckdb.connect()
        self.db.execute("SET TimeZone = 'UTC'")
        if place.startswith("s3://"):
            self._s3()
        for table in TABLES:
            files = f"{place.rstrip('/')}/{table}/**/*.parquet"
            self.db.execute(f"CREATE VIEW {table}_files AS SELECT * FROM read_parquet('{files}', hive_partitioning = true)")
        for view in views():
            self.db.execute(view)

    def _s3(self):
        try:
            import duckdb_extension_httpfs as packaged

            extension = next(pathlib.Path(packaged.__file__).parent.rglob("httpfs.duckdb_extension"))
            self.db.execute(f"LOAD '{extension}'")
        except ImportError:
            self.db.execute("INSTALL httpfs; LOAD httpfs")
        secret = ["TYPE s3", f"REGION '{os.environ.get('AWS_REGION', 'us-east-1')}'"]
        for key, name in (("KEY_ID", "AWS_ACCESS_KEY_ID"), ("SECRET", "AWS_SECRET_ACCESS_KEY"), ("SESSION_TOKEN", "AWS_SESSION_TOKEN")):
            if os.environ.get(name):
                secret.append(f"{key} '{os.environ[name]}'")
        if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
            url = urllib.parse.urlparse(endpoint)
            secret += [f"ENDPOINT '{url.netloc}'", "URL_STYLE 'path'", f"USE_SSL {str(url.scheme == 'https').lower()}"]
        self.db.execute(f"CREATE SECRET ({', '.join(secret)})")

    def query(self, sql):
        result = self.db.execute(sql)
        return [column[0] for column in result.description], result.fetchall()


class DataFusion:
    def __init__(self, place):
        import datafusion

        config = datafusion.SessionConfig().set("datafusion.execution.time_zone", "+00:00")
        self.db = datafusion.SessionContext(config)
        if place.startswith("s3://"):
            from datafusion.object_store import AmazonS3

            url = urllib.parse.urlparse(place)
            endpoint = os.environ.get("AWS_ENDPOINT_URL")
            store = AmazonS3(
                bucket_name=url.netloc,
                region=os.environ.get("AWS_REGION", "us-east-1"),
                access_key_id=os.environ.get("AWS_ACCESS_KEY_ID"),
                secret_access_key=os.environ.get("AWS_SECRET_ACCESS_KEY"),
                session_token=os.environ.get("AWS_SESSION_TOKEN"),
                endpoint=endpoint,
                allow_http=bool(endpoint and endpoint.startswith("http://")),
            )
            self.db.register_object_store("s3://", store, url.netloc)
        for table in TABLES:
            self.db.sql(
                f"CREATE EXTERNAL TABLE {table}_files STORED AS PARQUET PARTITIONED BY (cluster, date, hour) "
                f"LOCATION '{place.rstrip('/')}/{table}/'"
            )
        for view in views():
            self.db.sql(view)

    def query(self, sql):
        import pyarrow

        frame = self.db.sql(sql)
        batches = frame.collect()
        table = pyarrow.Table.from_batches(batches, schema=batches[0].schema if batches else frame.schema())
        # Nanoseconds are more than Python's moments hold.
        plain = [
            column.cast(pyarrow.timestamp("us", tz="UTC"), safe=False) if pyarrow.types.is_timestamp(column.type) else column
            for column in table.columns
        ]
        return table.column_names, list(zip(*(column.to_pylist() for column in plain))) if table.num_columns else []


ENGINES = {"duckdb": DuckDb, "datafusion": DataFusion}


def connect(place, engine="duckdb"):
    """An engine that has the views; `query(sql)` returns names and rows."""
    return ENGINES[engine](place)


def plain(value):
    """A value as JSON, the same for every engine."""
    if isinstance(value, decimal.Decimal):
        value = float(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else round(value, 6)
    if isinstance(value, datetime.datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)
        return moment.astimezone(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    return value if value is None or isinstance(value, (int, str, bool)) else str(value)


def show(names, rows):
    cells = [[("" if value is None else str(plain(value))) for value in row] for row in rows]
    widths = [max(len(line[at]) for line in [names, *cells]) for at in range(len(names))]
    for line in [names, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="duckdb")
    parser.add_argument("--json", action="store_true", help="one object for each query, with its rows")
    parser.add_argument("place", help="where the tables are: a folder, or s3://BUCKET/PREFIX")
    parser.add_argument("query", nargs="*", help="SQL; without any, the queries of docs/sql.md")
    arguments = parser.parse_args()
    engine = connect(arguments.place, arguments.engine)
    for title, query in [("", query) for query in arguments.query] or page_queries():
        names, rows = engine.query(query)
        if arguments.json:
            print(json.dumps({"title": title, "columns": names, "rows": [[plain(value) for value in row] for row in rows]}))
        else:
            if title:
                print(f"\n{title}")
            show(names, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
