"""Our scores against those of the official packages: the same files, pictures and prompts.

    python tests/reference/compare.py FOLDER     # after authority.py FOLDER [--full]

It prints a line for each reward, and last one JSON document. The exit code is 1 if a score differs by more than
`limit`.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import BlipTextConfig, BlipVisionConfig, CLIPConfig, Qwen2VLConfig

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import weights  # noqa: E402

import preference as P  # noqa: E402
import pretrained  # noqa: E402
import rewards as R  # noqa: E402


def limit(name: str, score: float) -> float:
    """How far ours may be from the official score: 1e-5, and beyond 1 that fraction of the score.

    pickscore and clip are 100 x a cosine. float32 holds a cosine only to about 6e-8, which is 6e-6 of the score, and
    the CPU's matrix kernels decide how such errors add up: the largest difference of pickscore was 7.6e-6 on one CPU
    and 1.03e-5 on another. For these two the limit is 3e-5, that is 3e-7 of the cosine.
    """
    return max(1e-5 * max(1, abs(score)), 3e-5 if name in ("pickscore", "clip") else 0.0)


def reduce_architectures(folder: Path, patch=setattr) -> None:
    """Give preference.py the reduced architectures where it holds the official ones."""
    tokenizers = weights.clip_tokenizer, weights.bert_tokenizer, weights.qwen_tokenizer
    small = weights.configs(*(make(folder) for make in tokenizers))
    patch(P, "VIT_H", CLIPConfig(**small["hpsv2"]))
    patch(P, "BLIP_VISION", BlipVisionConfig(**small["blip_vision"]))
    patch(P, "BLIP_TEXT", BlipTextConfig(**small["blip_text"]))
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}}
    qwen = {"text_config": small["qwen_text"] | rope, "vision_config": small["qwen_vision"]} | small["qwen"]
    patch(P, "QWEN2_VL", Qwen2VLConfig(**qwen))


def tensors() -> list[torch.Tensor]:
    """The pictures as rewards take them: (1, 3, H, W) in [0, 1]."""
    return [torch.from_numpy(np.array(p)).permute(2, 0, 1)[None].float() / 255 for p in weights.pictures()]


def our_ratings(model) -> list[float]:
    """VQ, MQ, TA of every video with every prompt that VideoAlign can read, prompts outermost.

    All prompts of a video are one batch.
    """
    prompts = [p for p in weights.PROMPTS if "<|" not in p]
    videos = [torch.from_numpy(v).permute(0, 3, 1, 2).float() / 255 for v in weights.videos()]
    return torch.stack([model(v.expand(len(prompts), *v.shape), prompts) for v in videos], 1).flatten().tolist()


def our_scores(reward) -> list[float]:
    """Every picture with every prompt, prompts outermost; all prompts of a picture are one batch."""
    n = len(weights.PROMPTS)
    return torch.stack([reward(x.expand(n, -1, -1, -1), weights.PROMPTS) for x in tensors()], 1).flatten().tolist()


def seconds_per_picture(reward, batch: int, n: int = 64) -> float:
    """Seconds per picture of 64 x 64, in batches of `batch`; 16 pictures have the same prompt, as in training."""
    x, prompts = torch.rand(n, 3, 64, 64), [f"a red cat {i // 16}" for i in range(n)]
    reward(x[:batch], prompts[:batch])
    began = time.perf_counter()
    for i in range(0, n, batch):
        reward(x[i : i + batch], prompts[i : i + batch])
    return (time.perf_counter() - began) / n


def full(name: str, setup: pretrained.Setup) -> tuple[list[float], dict]:
    """Scores of three pictures at full size, and the seconds and memory that loading and scoring took."""
    began = time.perf_counter()
    reward = R.REWARDS[name](setup)
    loaded = time.perf_counter()
    ours = [reward(x, [p]).item() for x, p in zip(tensors()[:3], weights.PROMPTS)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = {"seconds_loading": loaded - began, "seconds_per_picture": (time.perf_counter() - loaded) / 3}
    return ours, row | {"peak_memory_gib_so_far": peak}


def main() -> None:
    """Compare every reward that the packages scored."""
    folder = Path(sys.argv[1]).resolve()
    authority = json.loads((folder / "scores.json").read_text())
    setup, document = pretrained.Setup(str(folder), batch=64), {}

    # Three pictures are scored at full size, 88 at reduced size.
    at_full_size = len(authority["scores"]["hpsv2"]) == 3
    if not at_full_size:
        reduce_architectures(folder)

    for name, theirs in authority["scores"].items():
        if name == "videoalign":
            ours, row = our_ratings(P.VideoAlign(setup)), {}
        elif at_full_size:
            ours, row = full(name, setup)
        else:
            reward = R.REWARDS[name](setup)
            ours = our_scores(reward)
            row = {f"seconds_per_picture_batch_{b}": seconds_per_picture(reward, b) for b in (1, 64)}
        row["seconds_per_picture_authority"] = authority["seconds"][name]

        differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        passed = all(d <= limit(name, b) for d, b in zip(differences, theirs))
        result = {"largest_difference": max(differences), "pictures": len(theirs), "range": [min(theirs), max(theirs)]}
        document[name] = result | {"passed": passed} | row

        timing = ", ".join(f"{k} {v:.4f}" for k, v in row.items())
        print(f"{name:<12} differs by {max(differences):.1e} at most, {len(theirs)} pictures; {timing}", flush=True)
    print(json.dumps(document))
    sys.exit(not all(row["passed"] for row in document.values()))


if __name__ == "__main__":
    main()
