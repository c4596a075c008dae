"""Extract on a Ray cluster. Needs Ray on every machine, beside this program: pip install "ray[data]"

python recipes/ray_extract.py PARAMS IMAGES ROWS [KEY=VALUE ...]

IMAGES is a text of paths or URLs, one a line; ROWS a folder for Parquet. Paths, ROWS and cache.dir have to be there on
every machine, or be a bucket's (not cache.dir: then each machine has its own, and `pipeline cache import ROWS` brings
all into one). Give extract.workers=CORES, what one machine has, and with several kinds of machines extract.precision.
"""

import sys

import ray

from pipeline import Embedder, load_params

BATCH = 512  # images that one call gets, and that a dead worker has to do again


def extract(params, images, rows, *, embedder=Embedder, gpus=0):
    """One worker a machine, or with ``gpus=1`` one a GPU; those that die are started again, and their batches too."""
    cores = params.extract.workers if isinstance(params.extract.workers, int) else 1
    machines = max(int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1) // (gpus or cores)), 1)
    batches = ray.data.read_text(images).rename_columns({"text": "path"})
    batches.repartition(target_num_rows_per_block=BATCH).map_batches(
        embedder,
        fn_constructor_args=(params,),
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=machines),
        num_cpus=max(cores - 1, 0.5),  # one is left to what reads and writes
        num_gpus=gpus,
    ).write_parquet(rows)


if __name__ == "__main__":
    ray.init()
    params_file, images, rows, *settings = sys.argv[1:]
    extract(load_params(params_file, settings), images, rows)
