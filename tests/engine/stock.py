"""Loads published models in a Python that cannot import emssl_hf, and saves what they compute.

Called as `python -I stock.py PIXELS.npy OUT FOLDER...`: grey images (N, H, W) uint8, the folder for OUT/0.npz, ...
"""

import sys


class _NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "emssl_hf":
            raise ImportError("emssl_hf must not be needed")


sys.meta_path.insert(0, _NotHere())

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification  # noqa: E402


def compute(folder: str, images: list[Image.Image]) -> dict[str, object]:
    """Normalised input and output of the model in `folder`, which must load with nothing missing or left over."""
    auto = AutoModelForImageClassification if folder.endswith("classifier") else AutoModel
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    inputs = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    with torch.no_grad():
        output = model.eval()(**inputs)
    found = {"pixel_values": inputs["pixel_values"].numpy(), "kind": type(model).__name__}
    if auto is AutoModel:
        return found | {"tokens": output.last_hidden_state.numpy(), "pooled": output.pooler_output.numpy()}
    return found | {"scores": output.logits.softmax(1).numpy(), "names": list(model.config.id2label.values())}


if __name__ == "__main__":
    pixels, out, *folders = sys.argv[1:]
    pictures = [Image.fromarray(image) for image in np.load(pixels)]
    for number, folder in enumerate(folders):
        np.savez(f"{out}/{number}.npz", **compute(folder, pictures))
    assert not [name for name in sys.modules if name.startswith("emssl_hf")]
