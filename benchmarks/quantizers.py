"""Two trained Vision Transformers through every quantizer that their user might choose, judged by exact arithmetic.

    subjects.py: model, images, FP32's answers  ->  for every candidate:  peers.py: INT8 model and what it cost
                                                                      ->  judge.py: SQNR, top-1, agreement
                                                ->  results/quantizers.json

    pip install -e '.[compile,cpu,camera,bench]'
    python -m benchmarks.quantizers --images DIR [--subject focus] [--only 'int8*' NNCF] [--judge 1000] [--output FILE]

DIR holds train/CLASS/*.jpg and test/CLASS/*.jpg: any labelled photographs, such as CIFAR-10's, for the probe that `focus` is
judged through. Every candidate is calibrated on the same training images and judged on the same others. How fast the results
run is not measured here: that is cpu_latency.py. What is done is kept in .cache/quantizers/ by its content, so a run that
was interrupted goes on where it stopped. Knows nothing of Markdown: that is readme.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from benchmarks import cpu_latency, peers
from benchmarks.cpu_latency import PLAIN, ROOT, err, float_onnx, float_openvino, kept, rounded, versions
from benchmarks.judge import judge
from benchmarks.peers import Inputs, Quantizer, run_alone
from benchmarks.subjects import CACHE, SUBJECTS, Reference, Subject, reference, scores
from vitedge.bench.environment import environment
from vitedge.compiler.activations import images_sha256
from vitedge.compiler.export import export
from vitedge.errors import VitEdgeError
from vitedge.images import sample
from vitedge.specs import Recipe, to_dict
from vitedge.workspace import content_key, load_recipe, read_json, sha256, staged, write_json

OUR_RECIPES = ("int8", "int8-fast", "int8-attention")
ABLATION = {  # label -> recipe: first step by step from PLAIN to int8, then away from int8
    "smoothing": replace(PLAIN, smoothing="fixed", shift=False),
    "smoothing, shift": replace(PLAIN, smoothing="fixed"),
    "smoothing, shift, exponent per tensor": replace(PLAIN, smoothing="auto"),
    "smoothing, shift, exponent per tensor, bias correction": replace(PLAIN, smoothing="auto", bias_correction=True),
    "int8 with one exponent": Recipe(smoothing="fixed"),
    "int8 with ranges by output error": Recipe(method="auto"),
    "int8 with 4-bit weights in the MLPs": Recipe(int4=("*mlp*",)),
}
SEEDED, SEEDS = "int8", range(5)
ENGINES = ("int8",)  # recipes that are also judged as built engines
Group = Literal["recipe", "ablation", "seed", "peer"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row or more of the results.

    seed: of the drawing of calibration images. ways: see judge.WAYS. key: changes with all that quantizes.
    """

    name: str
    group: Group
    quantizer: Quantizer
    key: str
    ways: tuple[str, ...] = ("exact",)
    seed: int = 0


def main() -> None:
    """Measure all subjects and write them as JSON."""
    arguments = parse()
    names = [arguments.subject] if arguments.subject else list(SUBJECTS)
    subjects = [SUBJECTS[name](arguments) for name in names]
    sections = {subject.name: section(subject, arguments) for subject in subjects}
    facts = {**environment(), "command": command(sys.argv[1:])}
    packages = {**versions(), "modelopt": peers.MODELOPT[0].partition("==")[2]}
    write_json(arguments.output, {"environment": facts, "versions": packages, "sections": sections})
    err.print(f"{arguments.output}: written")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.quantizers", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=Path, help="labelled images: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg")
    parser.add_argument("--subject", choices=SUBJECTS, help="one of them alone")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=["*"], help="candidates by name or shell pattern")
    parser.add_argument("--judge", type=int, metavar="N", help="images to judge on (focus: 1000, fashion: 10000)")
    parser.add_argument("--probe", type=int, metavar="N", default=3000, help="images to train the probe of focus on")
    parser.add_argument("--calibration", type=int, metavar="N", help="images to calibrate on (focus: 64, fashion: 256)")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "quantizers.json")
    return parser.parse_args()


def command(words: Sequence[str]) -> str:
    """The command line for others to repeat: where the images lie here is of no use to them."""
    shown = ["--images=DIR" if word.startswith("--images=") else word for word in words]
    if "--images" in shown:
        shown[shown.index("--images") + 1] = "DIR"
    return shlex.join(["python", "-m", "benchmarks.quantizers", *shown])


def section(subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen candidates on one subject; their figures as plain data."""
    err.rule(subject.name)
    subject = replace(subject, calibration=arguments.calibration or subject.calibration)
    answers = reference(subject)
    rows, skipped = [], dict[str, str]()
    for candidate in chosen(arguments.only):
        try:
            rows += candidate_rows(candidate, subject, answers)
        except VitEdgeError as error:
            skipped[candidate.name] = str(error)
        if candidate.name in skipped:
            err.print(f"{candidate.name}: skipped: {skipped[candidate.name]}")
    err.print(table(rows))
    images = {"calibration_images": subject.calibration, "probe_images": len(subject.probe), "judge_images": len(subject.judge)}
    found = {"top1": rounded(top1(answers)), "rows": rows, "seeds": spread(rows), "skipped": skipped}
    return {"model": subject.card.name, **images, **found}


def chosen(patterns: Sequence[str]) -> list[Candidate]:
    """The candidates whose names fit one of `patterns`; none at all is a VitEdgeError."""
    found = [candidate for candidate in candidates() if fits(candidate.name, patterns)]
    if not found:
        names = ", ".join(candidate.name for candidate in candidates())
        raise VitEdgeError(f"--only {shlex.join(patterns)} fits no candidate", hint=f"there are {names}")
    return found


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the shell patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def candidates() -> list[Candidate]:
    """All of them, in the order of the results."""
    recipes = [(name, load_recipe(name)) for name in OUR_RECIPES]
    ours = [recipe_candidate(name, "recipe", recipe) for name, recipe in [*recipes, ("plain", PLAIN)]]
    others = [peer_candidate(name, quantizer) for name, quantizer in peers.PEERS.items()]
    ablation = [recipe_candidate(label, "ablation", recipe) for label, recipe in ABLATION.items()]
    seeded = load_recipe(SEEDED)
    seeds = [recipe_candidate(f"{SEEDED} seed {seed}", "seed", replace(seeded, seed=seed)) for seed in SEEDS]
    return [*ours, *others, *ablation, *seeds]


def recipe_candidate(name: str, group: Group, recipe: Recipe) -> Candidate:
    """vitedge under a recipe."""
    sources = [ROOT / "vitedge" / "specs.py", *sorted((ROOT / "vitedge" / "compiler").glob("*.py"))]
    key = content_key(to_dict(recipe), [sha256(path) for path in sources], versions())
    ways = ("exact", "engine fp32", "engine") if name in ENGINES else ("exact",)
    return Candidate(name, group, partial(peers.vitedge, recipe=recipe), key, ways, recipe.seed)


def peer_candidate(name: str, quantizer: Quantizer) -> Candidate:
    """A quantizer that is not ours."""
    sources = [Path(module.__file__ or "") for module in (peers, cpu_latency)]
    key = content_key(name, [sha256(path) for path in sources], versions())
    return Candidate(name, "peer", quantizer, key, ("openvino",) if name == "NNCF" else ("exact",))


def candidate_rows(candidate: Candidate, subject: Subject, answers: Reference) -> list[dict[str, Any]]:
    """Quantize, judge in every way of the candidate, and give one row a way."""
    folder = quantized(candidate, subject)
    cost = {name: rounded(value) for name, value in read_json(folder / "cost.json").items()}
    judged = [judgement(way, folder, subject, answers) for way in candidate.ways]
    told = [f"{figures['sqnr_db']:.1f} dB ({figures['judged']})" for figures in judged]
    err.print(f"{candidate.name}: {', '.join(told)}")
    return [{"name": candidate.name, "group": candidate.group, **figures, **cost} for figures in judged]


def quantized(candidate: Candidate, subject: Subject) -> Path:
    """The folder with the candidate's model and cost.json, made where it is not there yet."""
    files = tuple(sample(subject.pool, subject.calibration, candidate.seed))
    folder = CACHE / subject.name / content_key(subject.key, candidate.key, images_sha256(files))
    if not folder.exists():
        inputs = Inputs(subject.card, files, float_models(subject))
        with working(f"{candidate.name}: quantizing"), staged(folder) as temporary:
            temporary.mkdir()
            cost = run_alone(candidate.quantizer, inputs, temporary)
            write_json(temporary / "cost.json", asdict(cost))
    return folder


def float_models(subject: Subject) -> Path:
    """The folder with the float model in all the forms that the quantizers read."""
    sources = sorted((ROOT / "vitedge" / "compiler").glob("*.py"))
    folder = CACHE / subject.name / f"float-{content_key(subject.key, [sha256(path) for path in sources], versions())}"
    images = np.zeros((1, subject.card.preprocess.channels, *subject.card.preprocess.size), np.float32)
    same = cpu_latency.Subject(subject.module, subject.card, (), (), folder, images)
    with working(f"{subject.name}: exporting the float model"):
        kept(folder / "fp32.onnx", lambda path: export(subject.module, subject.card, path))
        float_onnx(same)
        float_openvino(same)
    return folder


def judgement(way: str, folder: Path, subject: Subject, answers: Reference) -> dict[str, Any]:
    """The figures of one way, kept beside the model."""
    sources = [Path(__file__).with_name(name) for name in ("judge.py", "subjects.py")]
    files = [images_sha256(images) for images in (subject.judge, subject.probe)]
    path = folder / f"judged-{content_key(way, files, [sha256(source) for source in sources], versions())}.json"
    if not path.exists():
        words, figures = judge(way, folder, subject, answers)
        write_json(path, {"judged": words, **{name: rounded(value) for name, value in figures.items()}})
    return read_json(path)


def working(on: str) -> AbstractContextManager[object]:
    """A line that moves while something takes its time; nothing where nobody looks, as it would leave empty lines."""
    return err.status(on) if err.is_terminal else nullcontext()


def top1(answers: Reference) -> float:
    """Percent of the judge images that FP32 gets right."""
    return float(100 * (scores(answers.outputs, answers.probe).argmax(axis=1) == answers.truth).mean())


def spread(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Smallest, median and largest of each figure over the seeds; {} where none was run."""
    seeds = [row for row in rows if row["group"] == "seed"]
    figures = [name for name, value in seeds[0].items() if not isinstance(value, str)] if seeds else []
    middle = {"min": np.min, "median": np.median, "max": np.max}
    return {name: {word: rounded(of([row[name] for row in seeds])) for word, of in middle.items()} for name in figures}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The figures for the terminal."""
    figures = {"sqnr_db": "SQNR dB", "class_sqnr_db": "class token dB", "top1": "top-1 %", "agreement": "agreement %"}
    figures |= {"seconds": "s", "peak_mib": "peak MiB"}
    shown = Table("quantizer", "judged", *figures.values())
    for row in rows:
        shown.add_row(row["name"], row["judged"], *(f"{row[name]:.2f}" if name in row else "" for name in figures))
    return shown


if __name__ == "__main__":
    try:
        main()
    except VitEdgeError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}" if error.hint else f"error: {error}")
