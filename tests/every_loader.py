"""Print, as JSON, the probabilities of photos by every loader: `every_loader.py MODEL hub|local PHOTO...`."""

import json
import sys

import timm
import torch
import transformers
from PIL import Image

import hotdog_hf
from hotdog_hf.data.images import decode_image
from hotdog_hf.data.transforms import eval_transform
from hotdog_hf.model.network import data_config_of, label_names_of


def with_timm(name, kind, images):
    model = timm.create_model(
        {"hub": f"hf-hub:{name}", "local": f"local-dir:{name}"}[kind], pretrained=True
    ).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return model.pretrained_cfg["label_names"], model(
        torch.stack([transform(image) for image in images])
    ).softmax(1)


def with_pipeline(name, kind, images):
    classify = transformers.pipeline("image-classification", model=name)
    names = sorted(classify.model.config.label2id, key=classify.model.config.label2id.get)
    rows = [{one["label"]: one["score"] for one in classify(image, top_k=None)} for image in images]
    return names, torch.tensor([[row[label] for label in names] for row in rows])


def with_auto_classes(name, kind, images):
    model = transformers.AutoModelForImageClassification.from_pretrained(name).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(name)
    logits = model(**processor(images, return_tensors="pt")).logits
    return [model.config.id2label[index] for index in range(logits.shape[1])], logits.softmax(1)


def with_hotdog_hf(name, kind, images):
    model = hotdog_hf.load_model(name)
    transform = eval_transform(data_config_of(model))
    return label_names_of(model), model(torch.stack([transform(image) for image in images])).softmax(1)


def main(name, kind, *photos):
    images = [decode_image(photo) for photo in photos]
    assert all(isinstance(image, Image.Image) for image in images)
    answers = {}
    with torch.no_grad():
        for loader in (with_timm, with_pipeline, with_auto_classes, with_hotdog_hf):
            label_names, probabilities = loader(name, kind, images)
            answers[loader.__name__] = {
                "label_names": list(label_names),
                "probabilities": probabilities.tolist(),
            }
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
