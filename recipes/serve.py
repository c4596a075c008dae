"""An HTTP service for an exported run; it needs model.onnx and nothing of this program.

pip install fastapi uvicorn onnxruntime pillow numpy
MODEL=model.onnx uvicorn --app-dir recipes serve:app
curl --data-binary @photo.jpg http://127.0.0.1:8000/predict
"""

import io
import json
import os

import numpy as np
import onnxruntime
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image, ImageOps

MAX_BYTES, MAX_PIXELS = 20_000_000, 50_000_000
session = onnxruntime.InferenceSession(os.environ.get("MODEL", "model.onnx"))
about = session.get_modelmeta().custom_metadata_map
names, decoding = json.loads(about["class_names"]), json.loads(about["decoding"])
resize = json.loads(about["transform"])["resize"] or 1
app = FastAPI(title=f"Run {about['run']}")


def decode(data: bytes) -> Image.Image:
    """RGB, turned as the camera was held and on the run's background; refused by its header if it is too large."""
    try:
        image = Image.open(io.BytesIO(data))
        short, long = sorted(image.size)
        if max(short * long, resize * resize * long // short) > MAX_PIXELS:
            raise HTTPException(413, f"the image is {image.width} x {image.height} pixels, more than are taken")
        image = ImageOps.exif_transpose(image) if decoding["exif"] else image
        if image.has_transparency_data:
            canvas = Image.new("RGBA", image.size, (*decoding["background"], 255))
            image = Image.alpha_composite(canvas, image.convert("RGBA"))
        return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"the image is too large: {error}") from error
    except (OSError, ValueError, SyntaxError, TypeError, ZeroDivisionError) as error:
        raise HTTPException(422, f"this is no image that can be read: {error}") from error


def classify(data: bytes) -> dict[str, object]:
    image = np.asarray(decode(data))
    probabilities, label = session.run(["probabilities", "label"], {"image": image})
    return {"label": names[label], "probabilities": dict(zip(names, probabilities.tolist(), strict=True))}


@app.post("/predict")
async def predict(request: Request) -> dict[str, object]:
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > MAX_BYTES:
            raise HTTPException(413, f"more than {MAX_BYTES:,} bytes")
    return await run_in_threadpool(classify, bytes(data))
