"""The model card: what the model is, how it was made, how good it is, with metadata for the Hub."""

import html
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from hotdog_hf.data.images import describe_preprocessing
from hotdog_hf.files import write_text
from hotdog_hf.metrics import CARD_METRICS, MAX_TABLE_CLASSES, most_confused
from hotdog_hf.model.licenses import card_license, license_warning
from hotdog_hf.model.neighbors import KEEP, Neighbors, usual_limit


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """The facts on a model card."""

    name: str
    # The run's config, in groups.
    config: dict
    # Photos by split and class.
    counts: dict[str, dict[str, int]]
    # The final test scores, `test_...`.
    scores: dict
    positive_label: str | None
    # The weights that training started from, and the preprocessing.
    source: str
    data_config: dict
    license: str
    hardware: str
    versions: str
    # What the recipe "best" tried and chose: the content of choice.json.
    choice: dict | None = None
    # What was kept of the training photos, see `model.neighbors`.
    neighbors: Neighbors | None = None


def write_card(run_dir: str | os.PathLike, facts: CardFacts) -> Path:
    """Write `model/README.md` of a run, with its pictures beside it, and return its path."""
    run_dir, config, counts, scores = Path(run_dir), facts.config, facts.counts, facts.scores
    positive_label, source = facts.positive_label, facts.source
    folder, label_names = run_dir / "model", list(counts["train"])
    metadata = huggingface_hub.ModelCardData(
        **card_license(facts.license),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "hotdog_hf"],
        base_model=source.removeprefix("hf-hub:") if source.startswith(("hf-hub:", "timm/")) else None,
        model_name=facts.name,
        eval_results=_eval_results(scores, positive_label, config["data"]["data_dir"], counts["test"]),
    )
    pictures = []
    for picture in ("curves.png", "samples.png"):
        if (run_dir / picture).is_file():
            shutil.copy(run_dir / picture, folder / picture)
            pictures.append(picture)
    text = "\n\n".join(
        [
            f"---\n{metadata.to_yaml()}\n---",
            f"# {_text(facts.name)}",
            _summary(label_names, counts, scores, source),
            _usage(folder, facts.data_config),
            _results(label_names, scores, positive_label, counts["test"]),
            _training(facts),
            *([_choice(facts.choice)] if facts.choice else []),
            *(f"![{picture.removesuffix('.png')}]({picture})" for picture in pictures),
            _limits(label_names, counts, scores, facts.neighbors),
            _license(facts.license),
        ]
    )
    huggingface_hub.ModelCard(text)  # raises if the metadata is not valid
    write_text(folder / "README.md", text + "\n")
    return folder / "README.md"


def _license(license: str) -> str:
    warning = license_warning(license)
    return f"## Licence\n\n{_text(license)}{f': {warning}' if warning else ''}."


def _text(value: object) -> str:
    """Escape a name for Markdown with HTML in it: a class called `<img onerror=...>` stays text."""
    return html.escape(str(value)).replace("|", "&#124;").replace("`", "&#96;").replace("\n", " ")


def _eval_results(scores: dict, positive_label: str | None, data_dir: str, test_counts: dict) -> list:
    names = {key: f"{label} ({positive_label})" for key, label in CARD_METRICS.items()} | {
        "accuracy": "Accuracy"
    }
    names |= {f"macro_{key}": f"{label} (macro)" for key, label in CARD_METRICS.items()}
    return [
        huggingface_hub.EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder",
            dataset_name=Path(data_dir).name or data_dir,
            dataset_split="test",
            dataset_args={"photos": sum(test_counts.values())},
            metric_type=key,
            metric_name=names[key],
            metric_value=round(scores[f"test_{key}"], 4),
        )
        for key in names
        if f"test_{key}" in scores
    ]


def _summary(label_names: list[str], counts: dict, scores: dict, source: str) -> str:
    classes = ", ".join(f"**{_text(name)}**" for name in label_names[:MAX_TABLE_CLASSES])
    classes += ", ..." if label_names[MAX_TABLE_CLASSES:] else ""
    return (
        f"An image classifier for {len(label_names)} classes: {classes}. Trained with hotdog_hf on"
        f" {sum(counts['train'].values())} photos, starting from {_text(source)};"
        f" it is right on {scores['test_accuracy']:.1%} of {sum(counts['test'].values())} test photos."
    )


def _usage(folder: Path, data_config: dict) -> str:
    return f"""## Use

Photos are {describe_preprocessing(data_config)}. Every loader below reads that from `config.json`. Replace
`MODEL` by the folder of this card, or by its name on the Hub.

```python
# transformers
from transformers import pipeline

classify = pipeline("image-classification", model="MODEL")
print(classify("photo.jpg"))
```

```python
# timm ("hf-hub:user/name" for a model on the Hub)
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:MODEL", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    probabilities = model(transform(Image.open("photo.jpg").convert("RGB"))[None]).softmax(dim=1)[0]
print(dict(zip(model.pretrained_cfg["label_names"], probabilities.tolist())))
```

```python
# hotdog_hf: with EXIF rotation, transparency, 16-bit and CMYK files handled as in training
import hotdog_hf

classify = hotdog_hf.load_predictor("MODEL")
print(classify("photo.jpg"))
```"""


def _results(label_names: list[str], scores: dict, positive_label: str | None, test_counts: dict) -> str:
    of = f" of {_text(positive_label)}" if positive_label else ""
    rows = [
        f"| {label}{'' if key == 'accuracy' else of} | {scores[f'test_{key}']:.4f} |"
        for key, label in CARD_METRICS.items()
        if f"test_{key}" in scores
    ]
    rows += [
        f"| {label}, mean over classes | {scores[f'test_macro_{key}']:.4f} |"
        for key, label in CARD_METRICS.items()
        if f"test_macro_{key}" in scores
    ]
    if "test_balanced_accuracy" in scores:
        rows.insert(1, f"| Accuracy, mean over classes | {scores['test_balanced_accuracy']:.4f} |")
    if "temperature" in scores:
        changed = scores["temperature"] != 1
        rows.append(f"| Log-loss | {scores['test_loss']:.4f} |")
        if changed:
            rows.append(f"| Log-loss before calibration | {scores['test_uncalibrated_loss']:.4f} |")
        rows.append(f"| Calibration error | {scores['test_calibration_error']:.4f} |")
        if changed:
            before = scores["test_uncalibrated_calibration_error"]
            rows.append(f"| Calibration error before calibration | {before:.4f} |")
    if len(label_names) > MAX_TABLE_CLASSES:
        confusion = ["\n| true class | predicted as | photos |\n| --- | --- | --- |"]
        confusion += [
            f"| **{_text(label_names[i])}** | {_text(label_names[j])} | {count} |"
            for i, j, count in most_confused(scores["test_confusion_matrix"], MAX_TABLE_CLASSES)
        ]
    else:
        heads = " | ".join(_text(name) for name in label_names)
        confusion = [f"\n| true class, predicted as | {heads} |\n| --- |{' --- |' * len(label_names)}"]
        confusion += [
            f"| **{_text(name)}** | {' | '.join(map(str, row))} |"
            for name, row in zip(label_names, scores["test_confusion_matrix"], strict=True)
        ]
    photos = sum(test_counts.values())
    return "\n".join(
        [
            f"## Results\n\nOn the {photos} photos of test, which no choice depended on:\n",
            "| metric | value |\n| --- | --- |",
            *rows,
            *confusion,
        ]
    )


def _training(facts: CardFacts) -> str:
    config, counts = facts.config, facts.counts
    label_names = list(counts["train"])
    by_class = {split: {_text(name): count for name, count in own.items()} for split, own in counts.items()}
    if len(label_names) > MAX_TABLE_CLASSES:
        by_class = {split: {"all classes": sum(own.values())} for split, own in counts.items()}
    columns = list(by_class["train"])
    table = [f"| split | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    table += [f"| {split} | {' | '.join(map(str, own.values()))} |" for split, own in by_class.items()]
    knobs = ": " + ", ".join(f"{name} {value}" for name, value in config["optim"].items())
    if not config["optim"]["epochs"]:
        knobs = ": the output layer was fitted to features of the pretrained network, which did not change"
    return "\n".join(
        [
            "## Training\n\nPhotos:\n",
            *table,
            f"\nRecipe {config['recipe']}, seed {config['run']['seed']}{knobs}.",
            f"\nHardware: {_text(facts.hardware)}. {facts.versions}.",
        ]
    )


def _choice(choice: dict) -> str:
    rows = [
        f"| {_text(row['name'])} | {row['log_loss']:.3f} ({row['log_loss_se']:.3f})"
        f" | {row['accuracy']:.3f} ({row['accuracy_se']:.3f}) | {row['photos']}, {row['how']} |"
        for row in choice["tried"]
    ]
    return "\n".join(
        [
            "## Choice\n\nThe recipe `best` tried these on parts of train (standard errors in brackets)"
            f" and chose {_text(choice['chosen'])}: {_text(choice['why'])}.\n",
            "| candidate | log-loss | accuracy | photos |",
            "| --- | --- | --- | --- |",
            *rows,
            "\nA fine-tuning is tested on a part of these photos, so its log-loss on all is estimated:"
            " that of the best fitted output layer, multiplied by the ratio of the two on that part.",
        ]
    )


def _limits(label_names: list[str], counts: dict, scores: dict, neighbors: Neighbors | None) -> str:
    import scipy.stats  # takes a second, and no run waits for it at its start

    matrix, total = scores["test_confusion_matrix"], sum(counts["test"].values())
    wrong = total - sum(row[index] for index, row in enumerate(matrix))
    worst, confused, times = next(iter(most_confused(matrix, 1)), (0, 0, 0))
    interval = scipy.stats.binomtest(total - wrong, total).proportion_ci(method="wilson")
    mistakes = (
        f"It was wrong on {wrong} of {total} test photos; most often ({times} times) it"
        f" took {_text(label_names[worst])} for {_text(label_names[confused])}."
        if wrong
        else f"It made no mistake on {total} test photos, which does not mean that it never will."
    )
    return (
        "## Limits and intended use\n\n"
        "Meant for photos like those it was trained on. For a picture of anything else it still names one of"
        f" its {len(label_names)} classes.{_rejection(neighbors)} {mistakes} The 95 % interval of its"
        f" accuracy is {interval.low:.3f} to {interval.high:.3f} (Wilson), as {total} photos tell no more."
        " Try the model on your own photos before you rely on it; it is not made for decisions about people."
    )


def _rejection(neighbors: Neighbors | None) -> str:
    limit = usual_limit(neighbors and neighbors.held_out_distances)
    if limit is None:
        return ""
    source = "training photos, each compared with the others,"
    if neighbors.held_out == "validation":
        source = "validation photos"
    return (
        " With hotdog_hf, `predict.py --reject` says `unknown` for a photo that is farther than"
        f" {limit:.4f} from the {len(neighbors.features)} training photos whose features are in"
        f" `neighbors.safetensors`. The limit was chosen so that {KEEP:.0%} of"
        f" {len(neighbors.held_out_distances)} {source} are nearer."
    )
