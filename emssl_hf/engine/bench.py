"""How fast pretraining is beside what one would use instead: both sides in one process, in turns, on the same files."""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining

from emssl_hf.data.scenes.micrograph import render
from emssl_hf.engine.config import PretrainConfig, parse
from emssl_hf.engine.loop import make_accelerator
from emssl_hf.engine.optim import build_optimizer
from emssl_hf.engine.pretrain import Pretraining, build_objective
from emssl_hf.engine.sources import open_source
from emssl_hf.machine import cores
from emssl_hf.models.positions import sincos_positions

EDGE, PATCH, BATCH = 96, 16, 64
WIDTH, DEPTH, HEADS, DECODER, DECODER_DEPTH = 192, 12, 3, 192, 4


def bench(output: Path | None = None, *, files: int = 128, steps: int = 6, rounds: int = 3) -> dict[str, Any]:
    """Images per second of MAE pretraining (ViT-Ti/16, 96 px, decoder 192x4, fp32) from JPEG files, ours and a peer's.

    The peer is transformers' Trainer with ViTMAEForPreTraining, files opened and cropped by Pillow in loader workers.
    Returns, prints and, with `output`, writes {"rows": [{"work", "against", "device", "ratio", "goal", ...}]}.
    """
    with tempfile.TemporaryDirectory() as home:
        folder = write_files(Path(home) / "micrographs", files)
        ours, prepared = our_side(folder, Path(home), steps)
        peer = peer_side(folder, Path(home), steps)
        pairs = [(ours(), peer()) for _ in range(rounds)]
    rates = [statistics.median(side) for side in zip(*pairs, strict=True)]
    row = {
        "work": f"MAE, ViT-Ti/16, decoder 192x4, {EDGE} px, fp32, from 1024x768 JPEG",
        "against": "transformers Trainer with ViTMAEForPreTraining, Pillow in two loader workers",
        "device": f"{platform.processor() or platform.machine()}, {cores()} cores, torch {torch.__version__}",
        "ratio": round(rates[0] / rates[1], 3),
        "goal": 3.0,
        "images_per_s": round(rates[0], 1),
        "peer_images_per_s": round(rates[1], 1),
        "rounds": [[round(one, 1) for one in pair] for pair in pairs],
        "store_seconds_per_1000_images": round(1000 * prepared / files, 2),
    }
    report = {"rows": [row]}
    if output is not None:
        output.write_text(json.dumps(report, indent=1))
    print(f"{row['work']}: {row['images_per_s']} images/s, peer {row['peer_images_per_s']}, ratio {row['ratio']}")
    print(f"once, before: {row['store_seconds_per_1000_images']} s per 1,000 images for the store")
    return report


def write_files(folder: Path, count: int) -> Path:
    """Synthetic micrographs as 1024x768 JPEG files."""
    folder.mkdir()
    for index in range(count):
        pixels = Image.fromarray(render(index, size=192).array).resize((1024, 768), Image.Resampling.BICUBIC)
        pixels.save(folder / f"{index}.jpg", quality=92)
    return folder


def our_side(folder: Path, home: Path, steps: int) -> tuple[Callable[[], float], float]:
    """A function that trains `steps` steps and gives images per second; and the seconds that the store took."""
    decoder = {"hidden_size": DECODER, "num_hidden_layers": DECODER_DEPTH, "num_attention_heads": HEADS}
    options = {f"decoder_{name}": value for name, value in decoder.items()} | {"decoder_intermediate_size": 4 * DECODER}
    settings = {
        "data": {"path": str(folder), "store": str(home / "stores"), "labels": "none"},
        "model": {"size": "tiny", "image_size": EDGE, "patch_size": PATCH, "options": options},
        "train": {"batch_size": BATCH, "precision": "no"},
        "output_dir": str(home / "run"),
    }
    config = parse(PretrainConfig, settings)
    accelerator = make_accelerator(config.train, home)
    began = time.perf_counter()
    job = Pretraining(config, build_objective(config, accelerator), open_source(config.data, accelerator), accelerator)
    prepared = time.perf_counter() - began
    optimizer = build_optimizer(job.model, config.optim, job.depth)

    def run() -> float:
        taken, epoch, began = 0, 0, time.perf_counter()
        while taken < steps:
            for batch in job.batches(epoch, 0, 1):
                loss, _ = job.loss(job.model, batch, epoch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                taken += 1
            epoch += 1
        return taken * BATCH / (time.perf_counter() - began)

    run()  # warm up
    return run, prepared


class Micrographs(Dataset[dict[str, Tensor]]):
    """JPEG files, opened, cropped, flipped and normalised by Pillow and NumPy, as common example scripts do."""

    def __init__(self, folder: Path, length: int) -> None:
        self.files, self.length = sorted(folder.glob("*.jpg")), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(index)
        image = Image.open(self.files[index % len(self.files)]).convert("RGB")
        share, ratio = rng.uniform(0.2, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        width = min(image.width, int((share * image.width * image.height * ratio) ** 0.5))
        height = min(image.height, int((share * image.width * image.height / ratio) ** 0.5))
        left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
        box = (int(left), int(top), int(left) + width, int(top) + height)
        pixels = np.asarray(image.resize((EDGE, EDGE), Image.Resampling.BICUBIC, box=box), dtype=np.float32) / 255
        pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
        return {"pixel_values": torch.from_numpy((np.ascontiguousarray(pixels) - 0.5) / 0.25).permute(2, 0, 1)}


class _Clock(TrainerCallback):
    """Times the steps after the first, in which workers start."""

    began = 0.0
    seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.began = time.perf_counter()
        self.seconds = time.perf_counter() - self.began


def peer_side(folder: Path, home: Path, steps: int) -> Callable[[], float]:
    """A function that trains the Trainer's model `steps` steps and gives images per second."""
    config = ViTMAEConfig(
        image_size=EDGE, patch_size=PATCH, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, decoder_hidden_size=DECODER, decoder_num_hidden_layers=DECODER_DEPTH,
        decoder_num_attention_heads=HEADS, decoder_intermediate_size=4 * DECODER, norm_pix_loss=True,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    grid = (EDGE // PATCH, EDGE // PATCH)
    with torch.no_grad():  # its own constructor leaves all positions zero
        model.vit.embeddings.position_embeddings.copy_(sincos_positions(WIDTH, grid))
        model.decoder.decoder_pos_embed.copy_(sincos_positions(DECODER, grid))
    arguments = TrainingArguments(
        output_dir=str(home / "peer"), max_steps=steps + 1, per_device_train_batch_size=BATCH, report_to=[],
        save_strategy="no", dataloader_num_workers=2, disable_tqdm=True, logging_strategy="no", weight_decay=0.05,
    )  # fmt: skip
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def run() -> float:
        clock = _Clock()
        data = Micrographs(folder, (steps + 1) * BATCH)
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()
        return steps * BATCH / clock.seconds

    run()  # warm up
    return run
