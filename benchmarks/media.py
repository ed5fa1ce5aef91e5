"""What made-up pictures are worth as a calibration set, on a model of real ones that is trained here.

    pip install scikit-learn
    python -m benchmarks.media

A small ViT learns the 1,797 handwritten digits that scikit-learn carries, drawn 32 pixels wide, four fifths of them; the
rest measures. Its MLPs become low rank of the same sizes, fitted in the Frobenius norm, on made-up pictures (``auto``), and
on a folder of the training pictures, each without refinement, and where there are rows with it. Prints the accuracy, and
the divergence from the dense model's classes. About three minutes on two cores.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import kl_div
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from transformers.utils.logging import disable_progress_bar

import spmconvert

SIDE, CLASSES = 32, 10
EPOCHS, BATCH_SIZE, LEARNING_RATE = 30, 64, 1e-3
# by share of the MLPs' parameters that is left, in per cent
RANKS = {5: 4, 10: 8, 25: 19, 50: 38}


def digits(part: slice) -> tuple[list[np.ndarray[Any, Any]], torch.Tensor]:
    """Pictures [side, side, 3] (uint8) and their classes, in an order that is drawn once."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))[part]
    grey = [Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((SIDE, SIDE)) for image in found.images[order]]
    return [np.asarray(image.convert("RGB")) for image in grey], torch.from_numpy(found.target[order])


def train(directory: Path, pictures: list[np.ndarray[Any, Any]], classes: torch.Tensor) -> None:
    """Train the dense model and save it with its processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=4,
        num_labels=CLASSES,
    )
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    model = ViTForImageClassification(config).train()
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = EPOCHS * (len(classes) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(0, len(classes), (BATCH_SIZE,))
        loss = model(pixel_values=pixels[chosen], labels=classes[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(directory)
    processor.save_pretrained(directory)


@torch.no_grad()
def answers(directory: Path, pixels: torch.Tensor) -> torch.Tensor:
    """What a model thinks of pictures: log-probabilities [pictures, classes]."""
    model = spmconvert.load(directory).eval()
    return torch.cat([model(pixel_values=piece).logits.log_softmax(-1) for piece in pixels.split(128)])


def main() -> None:
    """Train, convert and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pictures, classes = digits(slice(0, 1440))
        train(root / "vit", pictures, classes)
        (root / "digits").mkdir()
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(root / "digits" / f"{index:04}.png")
        held, truth = digits(slice(1440, None))
        pixels = ViTImageProcessor.from_pretrained(root / "vit")(images=held, return_tensors="pt")["pixel_values"]
        dense = answers(root / "vit", pixels)
        print(f"dense: accuracy {right(dense, truth):.3f} on {len(truth)} held-out digits")
        print("kept  calibrated on  refined  accuracy  KL to the dense model's classes, nats")
        for kept, rank in RANKS.items():
            for calib, refine in ((None, 0), ("auto", 0), (root / "digits", 0), ("auto", 8), (root / "digits", 8)):
                design = {"stages": 0, "rank": rank, "refine": refine, "output_weighting": calib is not None}
                spmconvert.convert(root / "vit", root / "spm", force=True, calib=calib, **design)
                found = answers(root / "spm", pixels)
                divergence = kl_div(found, dense, reduction="batchmean", log_target=True).item()
                what = "nothing" if calib is None else "made-up" if calib == "auto" else "digits"
                line = f"{kept:3} %  {what:13}  {'yes' if refine else 'no':7}  {right(found, truth):8.3f}  {divergence:.5f}"
                print(line, flush=True)


def right(answers: torch.Tensor, truth: torch.Tensor) -> float:
    """Share of the answers that are true."""
    return (answers.argmax(-1) == truth).float().mean().item()


if __name__ == "__main__":
    main()
