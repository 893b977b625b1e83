"""Fine-tune as in Dive into Deep Learning 14.2, in plain PyTorch: the baseline of scripts/benchmark.py.

python scripts/plain_loop.py my/photos --weights my.safetensors
python scripts/plain_loop.py my/photos --weights my.safetensors --channels-last --num-workers 2
"""

import argparse
import json
import time


def main(args: argparse.Namespace) -> None:
    """Train, and print one line of JSON per epoch."""
    import timm
    import torch
    from torchvision import datasets, transforms

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    torch.manual_seed(args.seed)
    file = {"file": args.weights}
    net = timm.create_model(args.model, pretrained=True, pretrained_cfg_overlay=file, num_classes=0)

    normalize = transforms.Normalize(net.pretrained_cfg["mean"], net.pretrained_cfg["std"])
    resize, crop = args.image_size * 8 // 7, args.image_size
    test = [transforms.Resize([resize, resize]), transforms.CenterCrop(crop)]
    train = test if args.no_augment else [
        transforms.RandomResizedCrop(crop), transforms.RandomHorizontalFlip()
    ]  # fmt: skip

    def loader(split: str, steps: list, shuffle: bool) -> torch.utils.data.DataLoader:
        transform = transforms.Compose([*steps, transforms.ToTensor(), normalize])
        photos = datasets.ImageFolder(f"{args.data_dir}/{split}", transform)
        workers = {"num_workers": args.num_workers, "persistent_workers": args.num_workers > 0}
        workers["pin_memory"] = device == "cuda"
        return torch.utils.data.DataLoader(photos, args.batch_size, shuffle=shuffle, **workers)

    train_loader, test_loader = loader("train", train, shuffle=True), loader("test", test, shuffle=False)
    body = [param.requires_grad_(not args.freeze_body) for param in net.parameters()]
    net.reset_classifier(len(train_loader.dataset.classes))
    head = net.get_classifier()
    torch.nn.init.xavier_uniform_(head.weight)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    net = net.to(device, memory_format=memory_format)
    groups = [{"params": head.parameters(), "lr": args.learning_rate * 10}]
    groups += [] if args.freeze_body else [{"params": body}]
    trainer = torch.optim.SGD(groups, lr=args.learning_rate, weight_decay=0.001)
    loss = torch.nn.CrossEntropyLoss(reduction="none")

    for epoch in range(1, args.epochs + 1):
        started, loss_sum, right, tested = time.perf_counter(), 0.0, 0, 0
        net.train(not args.freeze_body)
        for images, labels in train_loader:
            images, labels = images.to(device, memory_format=memory_format), labels.to(device)
            trainer.zero_grad()
            logits = net(images)
            losses = loss(logits, labels)
            losses.sum().backward()
            trainer.step()
            loss_sum += losses.sum().item()
            right += (logits.argmax(dim=1) == labels).sum().item()
        net.eval()
        with torch.no_grad():
            for images, labels in test_loader:
                logits = net(images.to(device, memory_format=memory_format))
                tested += (logits.argmax(dim=1) == labels.to(device)).sum().item()
        row = {"epoch": epoch, "train_loss": loss_sum / len(train_loader.dataset)}
        row |= {"train_accuracy": right / len(train_loader.dataset)}
        row |= {"test_accuracy": tested / len(test_loader.dataset), "seconds": time.perf_counter() - started}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data_dir", help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--weights", required=True, help="pretrained weights, a .safetensors or .pth file")
    parser.add_argument("--model", default="resnet18", help="any timm model name")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="of the body (head: 10 x)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-workers", type=int, default=0, help="loader processes")
    parser.add_argument("--num-threads", type=int, help="CPU threads; unset: torch's default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--channels-last", action="store_true", help="the memory format that hotdog_hf uses")
    parser.add_argument("--freeze-body", action="store_true", help="train only the output layer")
    parser.add_argument("--no-augment", action="store_true", help="treat training photos like test photos")
    main(parser.parse_args())
