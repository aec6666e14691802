"""The CPUs of a container, and the threads that follow from them."""

import pytest
import torch

from mistral_rerank.local import threads


def write(folder, files: dict[str, str]):
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("4:cpu,cpuacct:/x\n", {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_the_quota_is_that_of_the_cgroup(tmp_path, membership, files, quota):
    write(tmp_path, {"membership": membership} | files)
    assert threads.cpu_quota(tmp_path, tmp_path / "membership") == quota


@pytest.mark.parametrize(
    ("given", "environment", "quota", "expected"),
    [(3, {"OMP_NUM_THREADS": "2"}, 1.0, 3), (None, {}, 1.5, 1), (None, {}, 0.5, 1), (None, {}, None, 4)]
    + [(None, {"OMP_NUM_THREADS": "2"}, 1.0, 4), (None, {}, 64.0, 4)],
)
def test_threads_are_those_given_or_at_most_the_quota(monkeypatch, given, environment, quota, expected):
    before = torch.get_num_threads()
    monkeypatch.setattr("os.environ", environment)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    torch.set_num_threads(4)
    try:
        threads.set_threads(given)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
