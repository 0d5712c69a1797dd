"""Two processes agree to the bit, and with one, whatever they have to learn from (reliability 2.7).

    pytest tests/reliability/test_ranks.py -m 'slow or not slow'

What happens to one of them is in test_ranks_ill.py.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command import check_same
from tests.reliability import ill_ranks
from tests.reliability.ranks import PATCHY, Two, dumped, rewards, written
from tests.reliability.victims import ended, start


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    return written(tiny, tmp_path_factory.mktemp("config"))


def pictures(folder: Path) -> dict[str, torch.Tensor]:
    """All pictures that were drawn to learn from, by iteration, group and member."""
    found = {}
    for path in folder.glob("pictures-*.safetensors"):
        found |= {f"{path.name.split('-')[1]}-{key}": picture for key, picture in load_file(path).items()}
    return found


def one_and_two(words, folder: Path, iterations: int, before=ill_ranks.dump) -> tuple[Path, Path]:
    """The folders of dumps of the same run in one process and in two; the run folders are beside them."""
    one, two = folder / "one-dumps", folder / "two-dumps"
    for dumps in (one, two):
        dumps.mkdir(parents=True)
    words = [*words, f"run.iterations={iterations}", "run.save_every=100"]
    alone = start([*words, f"run.output={folder / 'one'}"], folder / "one.out", None, functools.partial(ill_ranks.dump, one))
    assert ended([alone]) == [0], (folder / "one.out").read_text()
    run = Two(words, folder / "two", functools.partial(before, two))
    assert run.codes == [0, 0], run.said
    assert json.loads((folder / "two" / "run.json").read_text())["world_size"] == 2
    return one, two


def apart(one: Path, two: Path, iteration: int, only: str = "") -> float:
    """Relative L2 distance of the accumulated changes of the weights that have `only` in their names."""
    start, a, b = (dumped(*where) for where in ((one, 0, 0), (one, 0, iteration), (two, 0, iteration)))
    names = [name for name in start if only in name]
    assert names
    change, difference = (torch.cat([(x[n] - y[n]).flatten() for n in names]).norm() for x, y in ((a, start), (b, a)))
    assert change > 0
    return (difference / change).item()


def check_agreement(one: Path, two: Path, iterations: list[int]) -> None:
    for iteration in iterations:
        check_same(dumped(two, 0, iteration), dumped(two, 1, iteration))
        whole, late = apart(one, two, iteration), apart(one, two, iteration, "lora_B")
        print(f"after {iteration} updates: {whole:.2g} of all weights, {late:.2g} of B")
        assert whole <= 1e-4 and late <= 1e-4


def check_rewards_and_pictures(folder: Path) -> None:
    mine, theirs = rewards(folder / "one"), rewards(folder / "two")
    assert mine.keys() == theirs.keys() and mine
    assert all((mine[k] is None) == (theirs[k] is None) for k in mine)
    differences = [abs((mine[k] or 0) - (theirs[k] or 0)) for k in mine]  # a byte of such a small picture is worth 1e-5
    mean, worst = sum(differences) / len(differences), max(differences)
    assert mean <= 1e-6
    drawn, others = pictures(folder / "one-dumps"), pictures(folder / "two-dumps")
    assert drawn.keys() == others.keys() and len(drawn) == len(mine)
    same = torch.cat([(drawn[k] == others[k]).flatten() for k in drawn]).double().mean().item()
    print(f"rewards differ by {mean:.2g}, {worst:.2g} at most; {same:.5%} of the bytes are equal")
    assert same >= 0.999


def uneven(folder: Path) -> list[tuple[int, int]]:
    """(rows that teach on process 0, on process 1) of each iteration where these differ."""
    said = rewards(folder)
    iterations, found = max(k[0] for k in said) + 1, []
    for iteration in range(iterations):
        counts = [0, 0]
        for group in range(4):
            scores = [said[iteration, group, member] for member in range(4)]
            known = [s for s in scores if s is not None]
            counts[group // 2] += len(known) if len(set(known)) > 1 else 0
        found += [(counts[0], counts[1])] if counts[0] != counts[1] else []
    return found


def test_ranks_agree_to_the_bit_and_with_one_process_where_their_counts_differ(config, tmp_path):
    """B starts at zero. In the second update A has hardly a gradient yet, and Adam steps by what is little more than rounding."""
    one, two = one_and_two([config, PATCHY], tmp_path, 3)
    assert uneven(tmp_path / "two"), "no iteration in which one process has more to learn from than the other"
    check_agreement(one, two, [1])
    check_same(dumped(two, 0, 3), dumped(two, 1, 3))
    assert apart(one, two, 3, "lora_B") <= 1e-4
    check_rewards_and_pictures(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], [PATCHY]], ids=["even", "uneven"])
def test_thirty_updates_are_the_same_on_one_process_and_on_two(config, tmp_path, words):
    one, two = one_and_two([config, *words], tmp_path, 30)
    if words:
        assert len(uneven(tmp_path / "two")) >= 10
    check_agreement(one, two, [1, 8, 30])
    check_rewards_and_pictures(tmp_path)


@pytest.mark.slow
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="the control: a mean of each process's mean is another gradient")
def test_means_of_means_are_told_apart(config, tmp_path):
    one, two = one_and_two([config, PATCHY], tmp_path, 8, ill_ranks.mean_of_means)
    check_agreement(one, two, [1, 8])


def test_a_run_goes_on_with_another_number_of_processes_and_says_so(config, tmp_path):
    for folder, iterations in (("whole", 2), ("moved", 1)):
        child = start([config, f"run.iterations={iterations}", f"run.output={tmp_path / folder}"], tmp_path / f"{folder}.out")
        assert ended([child]) == [0]
    run = Two([config, "run.iterations=2"], tmp_path / "moved")
    moved, whole = run.lora(), load_file(tmp_path / "whole" / "lora" / "pytorch_lora_weights.safetensors")
    assert "step-00000001 was written by 1 process, now 2: the same but for the last bits" in run.said[0]
    names = [name for name in whole if ".up." in name]  # they start at zero: the accumulated change itself
    assert (
        torch.cat([(moved[n] - whole[n]).flatten() for n in names]).norm()
        <= 1e-4 * torch.cat([whole[n].flatten() for n in names]).norm()
    )
    drawn = rewards(tmp_path / "moved")
    assert drawn.keys() == rewards(tmp_path / "whole").keys()
    assert all(abs(drawn[k] - reward) <= 1e-4 for k, reward in rewards(tmp_path / "whole").items())


def test_a_batch_that_two_processes_do_not_divide_is_refused_once_with_the_fix(config, tmp_path):
    run = Two([config, "rollout.prompts=7"], tmp_path / "run")
    assert run.codes == [2, 2] and run.said[1] == ""
    assert "rollout.prompts: is 7; it must be a multiple of" in run.said[0] and "use 8" in run.said[0]
    assert not run.folder.exists()
