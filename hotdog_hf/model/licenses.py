"""The licence of a trained model: that of the weights it started from, unless the user gives another."""

import json
import os
from pathlib import Path

# For a model trained from random weights.
OWN_LICENSE = "apache-2.0"
UNKNOWN = "unknown"
# What the Hub lists among its licences, of those that timm's models and Hub users have
# (https://huggingface.co/docs/hub/repositories-licenses). Any other is "other" there, with a name.
HUB_LICENSES = frozenset(
    "apache-2.0 mit bsd bsd-2-clause bsd-3-clause isc zlib wtfpl unlicense cc0-1.0 cc cc-by-3.0 cc-by-4.0"
    " cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-nc-nd-4.0"
    " cc-by-nd-4.0 gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 agpl-3.0 mpl-2.0 eupl-1.2 openrail apple-ascl"
    " apple-amlr gemma unknown other".split()
)
# Allow no commercial use, without saying so in their name.
RESEARCH_ONLY = frozenset(["apple-amlr"])
# Those with a standard text, which need no warning.
STANDARD = HUB_LICENSES - {"apple-ascl", "apple-amlr", "gemma", "unknown", "other"}


def choose_license(given: str | None, source: str | None) -> str:
    """Return the licence given, else that of the source, else ours if there is no source (None)."""
    return given or source or OWN_LICENSE


def describe_license(given: str | None, source: str | None) -> str:
    """Return the line printed before training: the licence, where it comes from, and what it forbids."""
    chosen = choose_license(given, source)
    warning = f"; {text}" if (text := license_warning(chosen)) else ""
    if given and source and given != source:
        allowed = "" if license_warning(source) is None else f" ({license_warning(source)})"
        return f"licence: {given} by --license, while the source's is {source}{allowed}: be sure that you may"
    if chosen == source == UNKNOWN:
        return "licence: unknown, as the source does not say; --license NAME sets it"
    return f"licence: {chosen}{', as the source' if source and not given else ''}{warning}"


def license_warning(license: str) -> str | None:
    """Return what users of a model under this licence must know, or None for a free one with a usual text."""
    name = license.lower()
    if name in RESEARCH_ONLY or any(word in name for word in ("-nc", "noncommercial", "non-commercial")):
        return "not for commercial use"
    if name == UNKNOWN:
        return "set the right one before you publish the model"
    return None if name in STANDARD else "it has terms of its own: read them before you publish the model"


def saved_license(folder: str | os.PathLike) -> str:
    """Return the licence that the `config.json` of a saved model names."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return config.get("pretrained_cfg", {}).get("license") or UNKNOWN


def describe_upload(folder: str | os.PathLike) -> str:
    """Return the line printed before a saved model is uploaded: its licence, and what it forbids."""
    license = saved_license(folder)
    warning = license_warning(license)
    return f"licence: {license}" + (f"; {warning}" if warning else "")


def card_license(license: str) -> dict[str, str]:
    """Return the licence as metadata of a model card, in the Hub's own words."""
    return {"license": license} if license in HUB_LICENSES else {"license": "other", "license_name": license}
