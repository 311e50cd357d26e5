"""Measure how well familiarity tells images of something else from CIFAR-10's test images.

Far: Fashion-MNIST, Tux Paint's stamps and OpenArena's textures, from Debian's archive (`apt-get download`, unpacked
with dpkg-deb, nothing is installed), and noise. Near: the small network of benchmarks/six_classes.py, or with `--near`
the run of its other one, is asked about the four classes that it never saw. Each method is measured; the one that
`gradserve package` chose, on other images, is named.

The third part asks what the test of the heatmap (`test=true`) predicts: on held-out images, the area under the ROC
curve of wrong answers by confidence alone and by confidence, `kept` and `removed` together; and for each verdict how
often it is given and how many of these answers are right.

    python benchmarks/familiar.py [MODEL_FOLDER] [--images 1000] [--only near [--near RUN]]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks.six_classes

from control.agent.cores import usable_cores

os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))  # before torch and OpenVINO read it

import argparse
import gzip
import json
import subprocess
import time
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from torch import nn
from torch.nn.functional import softmax

from benchmarks.six_classes import CHECKPOINT, EPOCHS, KNOWN, SmallNetwork, known_images
from handlers.engines import build_engine, run_all
from handlers.evidence.heatmaps import heatmap
from handlers.evidence.occlusion import keep_and_remove, verdict
from handlers.preprocess import decode_for_network, normalise, prepare
from training.data.images import CIFAR10_INPUT, Images, encode_png, load_test_images
from training.evaluate.familiarity import Answers, auroc, fit_methods, fpr_at_95, score
from training.evaluate.inference import run_engine
from training.evaluate.test_set_log import record_look
from training.package.artifacts import read_model, weights_sha256
from training.package.evidence import SCORES, choose_method, learn_training_images, linear_head
from training.package.packaging import split_images
from training.recipe import recipe_from_dict
from training.tracking.store import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from contracts.model import Input
    from training.package.evidence import Answer, Head

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("GRADSERVE_DATA", Path.home() / ".cache" / "gradserve"))
RESULT = ROOT / "benchmarks" / "results" / "familiar.json"
LOOKS = ROOT / "results" / "test_looks.jsonl"
PARTS = ("far", "near", "test")
SHOWS_CLASSES = ("animals", "vehicles", "military")  # folders of stamps with the model's own classes


def main() -> None:
    """Measure, print the tables and write them as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=Path("model_store/released"))
    options.add_argument("--images", type=int, default=1000, help="test images, and images of each unfamiliar kind")
    options.add_argument("--only", choices=PARTS, help="the other parts of the last result are kept")
    options.add_argument("--near", type=Path, help="a run of six_classes.py --config")
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    report = json.loads(chosen.output.read_text(encoding="utf-8")) if chosen.only and chosen.output.is_file() else {}
    started = time.perf_counter()
    for part in (chosen.only,) if chosen.only else PARTS:
        report[part] = {
            "far": lambda: measure_far(chosen.folder, chosen.images),
            "near": lambda: measure_near(chosen.images, chosen.near),
            "test": lambda: measure_test(chosen.folder),
        }[part]()
    report |= {
        "seconds": round(time.perf_counter() - started, 1),
        "load_average": os.getloadavg()[0],
        "environment": environment(),
    }
    chosen.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name in ("far", "near"):
        if name in report:
            show(name, report[name])
    if "test" in report:
        print(f"\ntest: {json.dumps(report['test'])}")
    print(f"written to {chosen.output}")


def measure_far(folder: Path, count: int) -> dict:
    """Return the figures of the released network, as served."""
    contract, network = read_model(folder)
    training, held_out = split_images(recipe_from_dict(contract.accepted.recipe or {}), CACHE)
    layer = contract.explain.sharp_layer
    engine = build_engine(contract.engine, lambda: network, directory=folder, device="cpu", sharp_layer=layer)

    def answer(images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return run_engine(engine, images, contract.input)

    head = linear_head(network)
    if head is None:
        raise SystemExit("the network has no linear head")
    unfamiliar = {kind: np.stack([*pixels]) for kind, pixels in far_images(contract.input, count).items()}
    familiar = load_test_images("cifar10", CACHE, contract.input).sample(count)
    name = f"{contract.name} {contract.version}"
    record_look(LOOKS, "benchmarks/familiar.py", model=name, part="test", images=len(familiar))
    return {
        "model": name,
        "weights_sha256": weights_sha256(folder),
        "engine": f"{contract.engine.name} {contract.engine.precision}",
        **compare(answer, head, training, held_out, familiar=familiar, unfamiliar=unfamiliar),
    }


def measure_test(folder: Path, batch: int = 250) -> dict:
    """Return how well wrong answers on held-out images are told by confidence, and by the test of the heatmap too."""
    contract, network = read_model(folder)
    _, held_out = split_images(recipe_from_dict(contract.accepted.recipe or {}), CACHE)
    layer, size = contract.explain.sharp_layer, (contract.input.height, contract.input.width)
    engine = build_engine(contract.engine, lambda: network, directory=folder, device="cpu", sharp_layer=layer)
    confidences, is_wrong = [], []
    for start in range(0, len(held_out), batch):
        images = normalise(held_out.images[start : start + batch], contract.input)
        outputs = run_all(engine, images)
        answers = outputs.probabilities.argmax(axis=1)
        heat, _ = heatmap(outputs, answers, contract.explain.method, size)
        kept, removed = keep_and_remove(engine, images, heat, answers)
        confidences.append(np.stack([outputs.probabilities.max(axis=1), kept, removed], axis=1))
        is_wrong.append(answers != held_out.labels[start : start + batch])
    found, wrong = np.concatenate(confidences), np.concatenate(is_wrong)
    log_odds = np.log(np.clip(found, 1e-6, 1 - 1e-6) / np.clip(1 - found, 1e-6, 1))
    together = cross_val_predict(LogisticRegression(), log_odds, wrong, cv=10, method="predict_proba")[:, 1]
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(1000):
        drawn = rng.integers(0, len(wrong), len(wrong))
        values, labels = (-log_odds[drawn, 0], together[drawn]), wrong[drawn]
        by_confidence, by_both = (auroc(value[labels], value[~labels]) for value in values)
        gains.append(by_both - by_confidence)
    verdicts = np.array([verdict("the class", *map(float, row)) for row in found])
    return {
        "model": f"{contract.name} {contract.version}",
        "held_out_images": len(wrong),
        "wrong": int(wrong.sum()),
        "method": contract.explain.method,
        "auroc": {
            "confidence": round(auroc(-log_odds[wrong, 0], -log_odds[~wrong, 0]), 4),
            "kept": round(auroc(-log_odds[wrong, 1], -log_odds[~wrong, 1]), 4),
            "removed": round(auroc(-log_odds[wrong, 2], -log_odds[~wrong, 2]), 4),
            "confidence, kept and removed": round(auroc(together[wrong], together[~wrong]), 4),
        },
        "gain_95_percent_interval": [round(float(np.quantile(gains, share)), 4) for share in (0.025, 0.975)],
        "verdicts": {
            str(text): {
                "images": int((verdicts == text).sum()),
                "accuracy": round(float(1 - wrong[verdicts == text].mean()), 4),
            }
            for text in np.unique(verdicts)
        },
    }


def measure_near(count: int, run: Path | None) -> dict:
    """Return the figures of the network that learnt six classes: the small one, or that of the folder `run`."""
    about, features_of, fc = _served_network(run) if run else _small_network()
    training, held_out = known_images()
    test = load_test_images("cifar10", CACHE, CIFAR10_INPUT)
    is_known = test.labels < KNOWN
    familiar, others = (test.pick(np.flatnonzero(chosen)) for chosen in (is_known, ~is_known))
    record_look(LOOKS, "benchmarks/familiar.py", model="six classes", part="test", images=len(test))
    names = {label: test.classes[label] for label in range(KNOWN, len(test.classes))}
    unfamiliar = {name: others.images[others.labels == label][:count] for label, name in names.items()}

    @torch.inference_mode()
    def answer(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for start in range(0, len(images), 500):
            features = features_of(torch.from_numpy(normalise(images[start : start + 500], CIFAR10_INPUT)))
            parts.append((softmax(fc(features), dim=1).numpy(), features.numpy()))
        probabilities, features = zip(*parts, strict=True)
        return np.concatenate(probabilities), np.concatenate(features)

    head = (fc.weight.detach().numpy(), fc.bias.detach().numpy())
    return {
        "training": about,
        "held_out_accuracy": round(_accuracy(answer, held_out), 4),
        "test_accuracy": round(_accuracy(answer, familiar), 4),
        **compare(answer, head, training, held_out, familiar=familiar.sample(4 * count), unfamiliar=unfamiliar),
    }


def _small_network() -> tuple[str, Callable[[Tensor], Tensor], nn.Linear]:
    """Return what the small network learnt, what computes its pooled features, and its last layer."""
    if not CHECKPOINT.is_file():
        raise SystemExit(f"{CHECKPOINT} is missing: run python benchmarks/six_classes.py, or pass --only far")
    saved = torch.load(CHECKPOINT, weights_only=True)
    network = SmallNetwork().eval()
    network.load_state_dict(saved["network"])
    about = f"{KNOWN} classes, {saved['step']} steps of a recipe of {EPOCHS} epochs, {saved['seconds']:.0f} s"
    return about, network.features, network.fc


def _served_network(run: Path) -> tuple[str, Callable[[Tensor], Tensor], nn.Linear]:
    """Return the same of a run of six_classes.py --config."""
    contract, network = read_model(run)
    provenance = contract.accepted.provenance
    if provenance is None or len(contract.classes) != KNOWN:
        raise SystemExit(f"{run} is no run of six_classes.py --config: pass one")
    *layers, fc = network.children()
    about = f"{KNOWN} classes, {contract.architecture}, {provenance.epochs} epochs, {provenance.duration_s:.0f} s"
    return about, nn.Sequential(*layers, nn.Flatten()), fc


def compare(
    answer: Answer,
    head: Head,
    training: Images,
    held_out: Images,
    *,
    familiar: Images,
    unfamiliar: dict[str, np.ndarray],
) -> dict:
    """Return for each method the area under the ROC curve and the false positives, and name the chosen method."""
    held_out = held_out.sample(SCORES)
    known, _ = learn_training_images(answer, head, training, thumbnails=False)
    candidates = choose_method(answer, known, _answers(answer, held_out.images), held_out)
    store, of_familiar = fit_methods(known), _answers(answer, familiar.images)
    of_unfamiliar = {kind: _answers(answer, pixels) for kind, pixels in unfamiliar.items()}
    methods = []
    for candidate in candidates:
        scores = score(candidate.method, candidate.neighbours, store, of_familiar)
        row: dict = {"method": candidate.method, "neighbours": candidate.neighbours, "chosen_by": candidate.score}
        for kind, answers in of_unfamiliar.items():
            others = score(candidate.method, candidate.neighbours, store, answers)
            row[kind] = {"auroc": round(auroc(scores, others), 4), "fpr_at_95": round(fpr_at_95(scores, others), 4)}
        for figure in ("auroc", "fpr_at_95"):
            row[figure] = round(float(np.mean([row[kind][figure] for kind in of_unfamiliar])), 4)
        methods.append(row)
    return {
        "familiar_images": len(familiar),
        "unfamiliar_images": {kind: len(pixels) for kind, pixels in unfamiliar.items()},
        "chosen": {"method": candidates[0].method, "neighbours": candidates[0].neighbours},
        "methods": methods,
    }


def _accuracy(answer: Answer, images: Images) -> float:
    return float((answer(images.images)[0].argmax(axis=1) == images.labels).mean())


def _answers(answer: Answer, images: np.ndarray) -> Answers:
    probabilities, features = answer(images)
    return Answers(probabilities, np.asarray(features))


def far_images(size: Input, count: int) -> dict[str, list[np.ndarray]]:
    """Return at most `count` images of each unfamiliar kind, (height, width, 3) uint8, prepared as serving does it."""
    rng = np.random.default_rng(0)
    shape = (count, size.height, size.width, 3)
    kinds = {
        "Fashion-MNIST": _sample(list(_fashion(count)), count, size),
        "Tux Paint's stamps": _sample(list(_stamps()), count, size),
        "OpenArena's textures": _sample(list(_textures()), count, size),
    }
    return kinds | {"uniform noise": [*rng.integers(0, 256, shape, np.uint8)]}


def _sample(files: list[bytes], count: int, size: Input) -> list[np.ndarray]:
    chosen = np.sort(np.random.default_rng(0).permutation(len(files))[:count])
    return [prepare(decode_for_network(files[number], size).image, size) for number in chosen]


def _fashion(count: int) -> Iterator[bytes]:
    path = unpack("dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz"
    pixels = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    for image in pixels[:count]:
        yield encode_png(image)


def _stamps() -> Iterator[bytes]:
    """Yield the PNG stamps that show none of the model's classes; transparency becomes white, as in serving."""
    folder = unpack("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    for path in sorted(folder.rglob("*.png")):
        if path.relative_to(folder).parts[0] not in SHOWS_CLASSES:
            yield path.read_bytes()


def _textures() -> Iterator[bytes]:
    """Yield the JPEG textures of walls, floors and liquids."""
    path = unpack("openarena-081-textures") / "usr/share/games/openarena/baseoa/pak4-textures.pk3"
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("textures/") and name.endswith(".jpg"):
                yield archive.read(name)


def unpack(package: str) -> Path:
    """Return the folder with a Debian package's files, fetched into the cache the first time."""
    folder = CACHE / "debian" / package
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=folder.parent, check=True)
        (file,) = folder.parent.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "--extract", str(file), str(folder)], check=True)
        file.unlink()
    return folder


def show(name: str, report: dict) -> None:
    """Print a table: the area under the ROC curve, and in brackets the unfamiliar images taken for familiar at 95 %."""
    kinds = [*report["unfamiliar_images"], "mean"]
    print(f"\n{name}: {report.get('model', report.get('training'))}, {report['familiar_images']} test images")
    print(f"{'method':20s}" + "".join(f"{kind:>22s}" for kind in kinds))
    for row in report["methods"]:
        cells = [row[kind] for kind in kinds[:-1]] + [row]
        label = f"{row['method']} {row['neighbours'] or ''}"
        print(f"{label:20s}" + "".join(f"{cell['auroc']:>14.4f} ({cell['fpr_at_95']:.3f})" for cell in cells))
    print(f"chosen on held-out images: {report['chosen']['method']} {report['chosen']['neighbours'] or ''}")


if __name__ == "__main__":
    main()
