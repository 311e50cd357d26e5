"""The `train`, `evaluate` and `package` commands: read options, call training's modules, print a summary.

Training's modules take seconds to import; they are imported when a command runs, not for `--help`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tomllib
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from contracts.model import load as load_contract
from control.agent.cores import usable_cores
from control.cli.archive import check_key, sign_with
from control.cli.hyper_parameters import with_hyper_parameters
from control.errors import ControlError
from control.settings import home_directory
from control.stack.serve import next_command, serve_command

if TYPE_CHECKING:
    from collections.abc import Iterator

console = Console()

Cache = Annotated[
    Path,
    typer.Option(envvar="GRADSERVE_DATA", help="Folder that keeps the data set.", show_default="~/.cache/gradserve"),
]
DEFAULT_CACHE = Path.home() / ".cache" / "gradserve"
RUNS = Path(".gradserve") / "training"
STORE = Path("model_store")
RESULTS = Path("results")


def register(app: typer.Typer) -> None:
    """Add the commands to the `gradserve` command."""
    panel = "Models"
    app.command(rich_help_panel=panel)(with_hyper_parameters(train))
    app.command(rich_help_panel=panel)(evaluate)
    app.command(rich_help_panel=panel)(package)


def train(
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of hyper-parameters, such as training/released.toml.", exists=True, dir_okay=False
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder.", show_default=f"{RUNS}/TIME")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the training in this folder, with its own recipe.")
    ] = None,
    cache: Cache = DEFAULT_CACHE,
    *,
    given: dict[str, Any],
) -> None:
    """Train a classifier and record it in MLflow.

    Without --pretrained the whole network is trained from scratch. With it, a new head is trained on the frozen
    backbone first, then the top layers at their own rate. A run is a folder: checkpoint of every epoch, best weights,
    contract, curves. --resume with a --config that adds cycles continues a finished run. With several processes:

    torchrun --nproc-per-node 2 -m control.cli.main train …

    Example: gradserve train --epochs 1 --subset 2000
    """
    if resume is not None and output is not None:
        raise ControlError("--resume continues in the folder of the training: remove --output")
    _show_progress()
    with _translate_errors():
        settings = tomllib.loads(config.read_text(encoding="utf-8")) if config else {}
        settings |= given
        if "epochs" in given:
            settings["cycles"] = []
        folder = resume or output or RUNS / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        _train(settings, folder, cache, resumes=resume is not None)
    if not _is_first_process():
        return
    contract = load_contract(folder / "contract.json")
    best = contract.accepted.figures.validation_accuracy
    console.print(f"best held-out accuracy [bold]{best:.2%}[/bold], in {folder}", soft_wrap=True)
    _say_next(f"next: {serve_command(home_directory(), contract.name, folder)}")
    _say_next(f"  or: gradserve evaluate {folder}")


def _train(settings: dict[str, Any], folder: Path, cache: Path, *, resumes: bool) -> None:
    """Train with `settings` in `folder`. Checks that need no torch, whose import takes seconds, come first.

    Raises:
        TrainingError: the recipe or the folder cannot be used.
        DataError: the data cannot be loaded.
    """
    from training.recipe import check, check_folder, recipe_from_dict  # noqa: PLC0415 - not for `--help`

    check_folder(folder, resumes=resumes)
    if not resumes:
        kind, _, path = str(settings.get("data", "")).partition(":")
        if kind == "imagefolder":
            settings.setdefault("name", _name_of(Path(path)))
    recipe = recipe_from_dict(settings)
    check(recipe)

    from training import train as training  # noqa: PLC0415 - imports torch

    if resumes:
        training.resume(folder, cache, changes=settings)
    else:
        training.train(recipe, folder, cache)


def _say_next(line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False)


def evaluate(  # noqa: PLR0917 - every option is an argument
    model: Annotated[str, typer.Argument(help="A run's folder, runs:/RUN_ID or models:/NAME@alias.")] = str(
        STORE / "released"
    ),
    data: Annotated[
        str | None,
        typer.Option(
            help="cifar10, cifar10:PATH of its archive or folder, or imagefolder:PATH.",
            show_default="the data set of its training",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the figures (JSON) and images.",
            show_default="MODEL/evaluation; results of the released model",
        ),
    ] = None,
    card: Annotated[Path | None, typer.Option(help="File to write a model card with these figures to.")] = None,
    explain_images: Annotated[
        int, typer.Option(help="Test images on which heatmaps are measured, which takes minutes; 0: none.", min=0)
    ] = 200,
    corrupted_images: Annotated[
        int,
        typer.Option(help="Number of test images to corrupt, each in 75 ways; 1000 for a release; 0: none.", min=0),
    ] = 0,
    cache: Cache = DEFAULT_CACHE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Measure a model and its heatmaps on the test images, with the engine that serves it.

    If its folder of images has no test part, the model is measured on the images that its training held out. Every
    evaluation on test images adds a line to test_looks.jsonl: in results for the released model, else in
    GRADSERVE_HOME.

    Example: gradserve evaluate model_store/released
    """
    _use_all_cores()
    _show_progress()
    from training.evaluate import evaluate as evaluation  # noqa: PLC0415 - imports torch

    is_released = Path(model).resolve() == (STORE / "released").resolve()
    looks = (RESULTS if is_released else home_directory()) / "test_looks.jsonl"
    if output is None:
        own = Path(model) if Path(model).is_dir() else Path(model).parent if Path(model).is_file() else RUNS
        output = RESULTS if is_released else own / "evaluation"
    with _translate_errors():
        report = evaluation.evaluate(
            model, data, cache, output, looks=looks, card=card, explained=explain_images, corrupted=corrupted_images
        )
    if as_json:
        print(json.dumps(report))  # noqa: T201 - for programs
        return
    console.print(_table(report))
    before, after = report["expected_calibration_error_before"], report["expected_calibration_error"]
    console.print(
        f"accuracy [bold]{report['accuracy']:.2%}[/bold] of {report['data']['images']:,} {report['data']['part']} "
        f"images, calibration error {after:.4f} ({before:.4f} at temperature 1)"
    )
    if heat := report.get("explanation"):
        console.print(
            f"heatmaps ({heat['method']}, {heat['layer']}) on {heat['images']} images: "
            f"insertion {heat['insertion']:.3f}, deletion {heat['deletion']:.3f}; random order: "
            f"{heat['random']['insertion_area']:.3f}, {heat['random']['deletion_area']:.3f}"
        )
    if rough := report.get("corrupted"):
        console.print(
            f"corrupted: accuracy [bold]{rough['accuracy']:.2%}[/bold], calibration error "
            f"{rough['expected_calibration_error']:.4f} ({rough['images']:,} images, each in 75 ways)"
        )
    console.print(f"{report['seconds']:.0f} s; written to {output}")


def package(  # noqa: PLR0917 - every option is an argument
    model: Annotated[str, typer.Argument(help="A run's folder, runs:/RUN_ID or models:/NAME@alias.")],
    version: Annotated[str, typer.Option(help="Name of the new version, such as 1.0.1.")],
    store: Annotated[Path, typer.Option(help="TorchServe's model store.")] = STORE,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for the version's files.", show_default="MODEL/package-VERSION")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16 or int8; bf16 and int8 are computed by OpenVINO.")
    ] = "fp32",
    engine: Annotated[
        str | None,
        typer.Option(
            help="eager (PyTorch) or openvino (PyTorch stays its fallback).",
            show_default="eager for fp32, else openvino",
        ),
    ] = None,
    max_drop: Annotated[
        float, typer.Option(help="Refuse bf16 or int8 if it loses more percentage points of held-out accuracy.", min=0)
    ] = 0.3,
    explain_images: Annotated[
        int,
        typer.Option(
            help="Held-out images that choose the heatmaps' layer and method; 500 for a release; 0: the defaults.",
            min=0,
        ),
    ] = 0,
    max_alike: Annotated[
        float,
        typer.Option(
            help="Refuse heatmaps whose rank correlation between an image's first and second class is above this.",
            min=-1,
            max=1,
        ),
    ] = 0.5,
    thumbnails: Annotated[  # noqa: FBT002 - a flag
        bool,
        typer.Option(
            help="Store small copies of some training images in the archive, to show images similar to a caller's."
        ),
    ] = True,
    sign: Annotated[
        Path | None, typer.Option(help="Sign the archive with this private key (gradserve archive sign).")
    ] = None,
    cache: Cache = DEFAULT_CACHE,
) -> None:
    """Pack a trained model into an archive that TorchServe serves.

    Weights are stored in half precision. The temperature is fitted, and the reference answers are computed, on the
    held-out images. int8 is calibrated on training images; its loss is written to gate.json, also in the archive.

    Example: gradserve package .gradserve/training/20260101-120000 --version 1.0.1 --precision int8
    """
    _use_all_cores()
    _show_progress()
    from training.package.packaging import package as pack  # noqa: PLC0415 - imports torch

    folder = keep or (Path(model) if Path(model).is_dir() else RUNS) / f"package-{version}"
    if sign is not None:
        check_key(sign)  # packing takes minutes
    with _translate_errors():
        made = pack(
            model,
            version,
            store,
            folder,
            cache,
            precision=precision,
            engine=engine,
            max_drop=max_drop / 100,
            explain_images=explain_images,
            max_alike=max_alike,
            thumbnails=thumbnails,
            sign=partial(sign_with, sign) if sign else None,
        )
    if (measured := made.contract.accepted.figures.held_out) is not None:
        console.print(
            f"[bold]{made.archive}[/bold]: held-out accuracy {measured.accuracy:.2%}, calibration error "
            f"{measured.calibration_error:.4f} (before: {measured.calibration_error_before:.4f})"
        )
    _say_next(f"next: {next_command(home_directory(), made.archive, made.contract.name, version)}")


def pack_run(run: Path, version: str, store: Path, cache: Path) -> Path:
    """Pack `run` with the defaults of `package` and return the archive; heatmaps above the bound only give a warning.

    Raises:
        ControlError: the run cannot be packed; the text says why.
    """
    _use_all_cores()
    _show_progress()
    from training.evaluate.heatmaps.choice import MAX_ALIKE  # noqa: PLC0415 - imports torch
    from training.package.packaging import package as pack  # noqa: PLC0415 - imports torch

    console.print(f"packing {run} as version {version}", soft_wrap=True, highlight=False)
    with _translate_errors():
        made = pack(str(run), version, store, run / f"package-{version}", cache, max_alike=1.0)
    alike = made.contract.accepted.figures.explain_class_correlation
    if alike is not None and alike > MAX_ALIKE:
        console.print(
            f"[yellow]heatmaps hardly depend on the class yet (rank correlation of the first and second class's: "
            f"{alike:.2f}, `package` refuses more than {MAX_ALIKE}): train longer[/yellow]"
        )
    return made.archive


def _name_of(images: Path) -> str:
    """Return the model's name, which is part of file names and addresses, from the folder of its images."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", images.resolve().name).strip("-") or "images"


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Translate training's errors into `ControlError`, which the command prints without a traceback."""
    from contracts.model import ContractError  # noqa: PLC0415 - not for `--help`
    from handlers.errors import EngineError  # noqa: PLC0415 - not for `--help`
    from training.errors import TrainingError  # noqa: PLC0415 - not for `--help`

    try:
        yield
    except (TrainingError, ContractError, EngineError) as error:
        raise ControlError(str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ControlError(f"the recipe is not valid TOML: {error}") from error


def _is_first_process() -> bool:
    """Return True in the first of the processes that torchrun started, the only one that prints."""
    return os.environ.get("RANK", "0") == "0"


def _use_all_cores() -> None:
    """Set OMP_NUM_THREADS to all cores unless it is set (default: one thread). Call before importing torch."""
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def _show_progress() -> None:
    """Print the log's lines and progress bars, without those of MLflow. Call before importing it."""
    level = os.environ.get("LOG_LEVEL", "INFO") if _is_first_process() else "WARNING"
    logging.basicConfig(level=level, format="%(message)s")
    for chatty in ("httpx", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def _table(report: dict[str, Any]) -> Table:
    table = Table("class", "precision", "recall", "f1", title=f"{report['model']['name']} {report['model']['version']}")
    for name, row in (*report["per_class"].items(), ("mean", report["macro"])):
        table.add_row(name, *(f"{row[column]:.3f}" for column in ("precision", "recall", "f1")))
    return table
