"""Fashion-MNIST from Parquet files, as the Hugging Face hub has it: accuracy and minutes.

    python benchmarks/fashion.py FOLDER [key=value …]

FOLDER holds the four IDX files of Fashion-MNIST (``train-images-idx3-ubyte`` …, gzipped or not; Debian's package
``dataset-fashion-mnist`` has them). They are written as Parquet with PNG structs, and ``benchmarks/fashion.yaml`` is
trained on them; what is timed is the whole of ``lab fit``.
"""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def array(folder: Path, name: str) -> np.ndarray:
    path = next(folder.rglob(f"{name}*"))
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    header = 4 + 4 * content[3]
    return np.frombuffer(content[header:], np.uint8).reshape(np.frombuffer(content[4:header], ">i4"))


def png(image: np.ndarray) -> dict[str, object]:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def convert(source: Path, target: Path) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = array(source, f"{prefix}-images"), array(source, f"{prefix}-labels")
        columns = {"image": pa.array(map(png, images), struct), "label": pa.array(labels.astype(np.int64))}
        pq.write_table(pa.table(columns), target / f"{split}-00000-of-00001.parquet")


def main(source: Path, overrides: list[str]) -> None:
    recipe = Path(__file__).with_suffix(".yaml").resolve()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "fashion-mnist"
        data.mkdir()
        convert(source, data)
        began = time.perf_counter()
        lab = str(Path(sys.executable).with_name("lab"))
        subprocess.run([lab, "fit", str(recipe), f"data.path={data}", *overrides], cwd=folder, check=True)
        print(f"{(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
