"""Copy to a bucket, or from it, what is absent there of a cache: pip install fsspec s3fs (or gcsfs, adlfs).

python recipes/bucket.py push cache s3://bucket/cache
python recipes/bucket.py pull cache s3://bucket/cache

Parts are immutable and their names are their digests, so this may be done at any time, by any number of machines, and
be interrupted: a part is whole or it is not there, and what arrived damaged is set aside when it is opened. Nothing is
removed; parts that were merged in one place come back from the other, with rows that repeat and do no harm.
"""

import re
import sys
from pathlib import Path

import fsspec

from pipeline.files import publish_file

# What features are, what cannot be decoded, what `auto` stands for; the rest is about the files of one machine.
KEPT = re.compile(
    r"[^/.][^/]*-[0-9a-f]{16}/(spec\.json|pixels\.json|part-[0-9a-f]{32}\.h5)"
    r"|quarantine/[0-9a-f]{16}/[0-9a-f]{32}\.notes|precision/[0-9a-f]{16}\.json"
)


def push(cache, url):
    """How many files were copied to the bucket, where each appears whole, as objects do."""
    cache, copied, vanished = Path(cache), 0, True
    bucket, top, there = listed(url)
    while vanished:  # a part was merged into another meanwhile: list again
        vanished = False
        names = {file.relative_to(cache).as_posix() for file in cache.rglob("*")}
        for name in sorted(filter(KEPT.fullmatch, names - there)):
            try:
                data = (cache / name).read_bytes()
            except FileNotFoundError:
                vanished = True
                continue
            bucket.makedirs(f"{top}/{name}".rpartition("/")[0], exist_ok=True)
            bucket.pipe_file(f"{top}/{name}", data)
            there.add(name)
            copied += 1
    return copied


def pull(cache, url):
    """How many files were copied from the bucket."""
    bucket, top, there = listed(url)
    absent = [name for name in sorted(filter(KEPT.fullmatch, there)) if not Path(cache, name).exists()]
    for name in absent:
        publish_file(Path(cache, name), bucket.cat_file(f"{top}/{name}"))
    return len(absent)


def listed(url):
    """The bucket, the place in it, and what lies there."""
    bucket, top = fsspec.url_to_fs(url, use_listings_cache=False)
    top = top.rstrip("/")
    return bucket, top, {name.removeprefix(f"{top}/") for name in bucket.find(top)}


if __name__ == "__main__":
    action, cache, url = sys.argv[1:]
    print(f"{ {'push': push, 'pull': pull}[action](cache, url) } files copied")
