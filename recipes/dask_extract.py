"""Extract on a Dask cluster. Needs Dask on every machine, beside this program: pip install "dask[distributed]" pandas

python recipes/dask_extract.py SCHEDULER PARAMS IMAGES ROWS [KEY=VALUE ...]

SCHEDULER is its address (tcp://...), or `local`; the rest is as for `ray_extract.py`. A worker embeds one batch at a
time with extract.workers cores: start one a machine (`dask worker --nworkers 1 --nthreads 1`), or one a GPU.
"""

import sys
from pathlib import Path

import pandas
from distributed import Client

from pipeline import Embedder, load_params

BATCH = 512  # images that one task gets, and that another worker has to do again when one dies


def embed(number, paths, *, embedder, rows):
    """A file of Parquet for each batch, written anew when the batch is tried again."""
    frame = embedder(pandas.DataFrame({"path": paths}))
    frame.to_parquet(f"{rows}/{number:08}.parquet", index=False)
    return len(frame)


def extract(client, params, images, rows, *, embedder=Embedder):
    """The number of rows. What died with its worker is done again by others."""
    paths = Path(images).read_text().splitlines()
    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    Path(rows).mkdir(parents=True, exist_ok=True)
    tasks = client.map(embed, range(len(batches)), batches, embedder=embedder(params), rows=rows, pure=False)
    return sum(client.gather(tasks))


if __name__ == "__main__":
    scheduler, params_file, images, rows, *settings = sys.argv[1:]
    with Client(n_workers=1, threads_per_worker=1) if scheduler == "local" else Client(scheduler) as client:
        print(extract(client, load_params(params_file, settings), images, rows), "rows")
