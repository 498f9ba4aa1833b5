"""The figures: the mask is drawn from what a model does, the heads from where its attention goes, losses from logs."""
import numpy as np
import pytest
import torch
from PIL import Image

import figures
from conftest import tiny_model

FRAME = torch.arange(12) // 4  # of each token


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_the_mask_is_what_the_model_does(tmp_path, attention):
    """Frame-causal: a token sees its own frame and all earlier ones. The picture has the table's colours."""
    table = figures.mask(tmp_path / "mask.png", tiny_model(attention=attention))
    frame_causal = FRAME[:, None] >= FRAME
    assert torch.equal(table, frame_causal if attention == "causal" else torch.ones(12, 12, dtype=torch.bool))
    assert (tmp_path / "mask.png").stat().st_size < 300_000
    with Image.open(tmp_path / "mask.png") as image:
        picture = np.asarray(image.convert("RGB"))
    middles = picture[78 + 13:78 + 12 * 26:26, 150 + 13:150 + 12 * 26:26]
    assert np.array_equal(middles.min(-1) < 200, table.numpy())  # blue, dark or pale, or white


def test_a_random_model_for_the_mask_reads_other_tokens():
    """An untrained model's blocks are the identity, and its table would be a diagonal."""
    torch.manual_seed(0)
    assert torch.equal(figures.seen_by(figures.random_model()), FRAME[:, None] >= FRAME)


def test_losses_are_means_of_one_run_without_frame_0(tmp_path, monkeypatch):
    """Steps 1 to 12 of two runs; every third step has t = 0 and a loss that would stand out."""
    monkeypatch.setattr(figures, "DATA", tmp_path)
    rows = [f"{run},{step},1,{step % 3},{100 * (step % 3 == 0) + step * scale},0,{2 * step}"
            for run, scale in (("9", 1), ("11", 7)) for step in range(1, 13)]
    (tmp_path / "videomar.csv").write_text("\n".join(["run,step,stage,t,loss,lr,seconds", *rows]))
    step, loss, seconds = figures.losses("11", window=4)
    assert step.tolist() == [(1 + 2 + 4 + 5) / 4, (2 + 4 + 5 + 7) / 4, 6, 7.5, 9]
    assert loss.tolist() == (7 * step).tolist() and seconds.tolist() == (2 * step).tolist()


def test_before_training_is_where_the_shipped_checkpoint_began():
    """Training moves the biases of queries and keys little; those of another seed's start have other signs."""
    trained, _, _ = figures.load_model(figures.DATA / "videomar.pt")
    start = figures.shipped_start(trained.config)
    biases = [model.blocks[1].qkv.bias[:2 * model.config.dim] for model in (start, trained)]
    assert torch.corrcoef(torch.stack(biases).detach())[0, 1] > 0.9


def test_attention_by_offset_finds_the_place_that_look_beside_chose(monkeypatch):
    """Heads that all look at the token one frame before, one row down and one column to the left."""
    model = tiny_model(dim=128, heads=2)
    with torch.no_grad():
        model.blocks[1].qkv.weight[:256] = 0  # queries and keys are their biases
        place = iter([torch.ones(2), torch.tensor([[-1, -1], [1, 1]])])  # k = R(place) q: the key at minus place
        monkeypatch.setattr(torch, "randint", lambda *_: next(place))
        model.blocks[1].qkv.bias[:256] = figures.videomar.look_beside(model.config, strength=4)
        monkeypatch.undo()
        maps = figures.attention_by_offset(model, torch.randn(2, 3, 6, 6, 16), ["a cat"] * 2, 2, layer=1, reach=2)
    assert maps.shape == (2, 2, 5, 5) and maps.sum((1, 2, 3)).max() <= 1.001
    assert maps.flatten(1).argmax(1).tolist() == [25 + 5 * 3 + 1] * 2  # dt = -1, dy = 1, dx = -1
