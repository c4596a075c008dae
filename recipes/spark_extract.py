"""Extract on a Spark cluster. Needs pandas and pyarrow on every machine, beside this program.

spark-submit --conf spark.task.cpus=CORES recipes/spark_extract.py PARAMS IMAGES ROWS [KEY=VALUE ...]

The arguments are as for `ray_extract.py`; give extract.workers=CORES, too.
"""

import sys

from pipeline import Embedder, load_params

BATCH = 512
SCHEMA = "path string, digest string, features array<float>, reason string, key string, checksum string"


def frames_embedded(embedder):
    """What `mapInPandas` takes: an iterator of frames to one of embedded frames."""
    return lambda frames: (embedder(frame) for frame in frames)


def extract(spark, params, images, rows):
    """Tasks that fail are tried again by Spark, and what they had published is not computed again."""
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", BATCH)
    paths = spark.read.text(images).withColumnRenamed("value", "path")
    tasks = max(paths.count() // BATCH, 1)
    embedded = paths.repartition(tasks).mapInPandas(frames_embedded(Embedder(params)), SCHEMA)
    embedded.write.mode("overwrite").parquet(rows)


if __name__ == "__main__":
    from pyspark.sql import SparkSession

    params_file, images, rows, *settings = sys.argv[1:]
    extract(SparkSession.builder.getOrCreate(), load_params(params_file, settings), images, rows)
