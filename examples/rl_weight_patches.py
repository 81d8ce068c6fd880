"""A trainer publishes a weight patch after each step of reinforcement learning; a server follows.

    python examples/rl_weight_patches.py [FOLDER]

A small policy learns by REINFORCE (Williams, 1992) which of 16 actions each of 16 situations asks
for. It is trained in float32 and served in bfloat16, where most updates are too small to change a
weight, so a patch is a fraction of the model. Each patch names the step it starts from and the
digest of all weights there, so the server cannot miss one, repeat one or take one of another run.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import deltakit as dk

KINDS, WIDTH, STEPS, LR = 16, 512, 20, 2e-5
ANSWERS = torch.randperm(KINDS, generator=torch.Generator().manual_seed(1))


def policy() -> nn.Sequential:
    """A situation, int64 [n], to the logits of the actions, [n, KINDS]."""
    layers = (nn.Embedding(KINDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(WIDTH, KINDS))


def served(trained: nn.Module) -> dict[str, torch.Tensor]:
    """The weights as the server holds them."""
    return {name: tensor.bfloat16() for name, tensor in trained.state_dict().items()}


def reinforce(trained: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """One step on 1,024 actions that the policy draws; returns their mean reward."""
    situations = torch.randint(0, KINDS, (1024,))
    chosen = torch.distributions.Categorical(logits=trained(situations))
    actions = chosen.sample()
    rewards = (actions == ANSWERS[situations]).float()
    loss = -(chosen.log_prob(actions) * (rewards - rewards.mean())).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return rewards.mean().item()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    trained, server, late = policy(), policy().bfloat16(), policy().bfloat16()
    for model in (server, late):
        model.load_state_dict(served(trained))  # all start from one checkpoint
    optimizer = torch.optim.Adam(trained.parameters(), lr=LR)
    stream = dk.PatchStream(served(trained))
    whole = 2 * sum(tensor.numel() for tensor in trained.parameters())
    print(f"the whole model: {whole:,} bytes")
    for step in range(1, STEPS + 1):
        reward = reinforce(trained, optimizer)
        file = folder / f"patch-{step:05d}.sdelta"
        dk.save(stream.step(served(trained)), file)  # the trainer's side
        dk.apply(server, dk.load(file))  # the server's side
        if step % 5 == 0:
            size = file.stat().st_size
            print(f"step {step}: reward {reward:.2f}, {size:,} bytes, {size / whole:.1%}")
    assert dk.chain_position(server, verify=True) == stream.position
    for name, tensor in served(trained).items():
        assert torch.equal(tensor, server.state_dict()[name]), name
    print(f"the server's weights are the trainer's, bit for bit, at {stream.position}")

    patches = [dk.load(file) for file in sorted(folder.glob("patch-*.sdelta"))]
    dk.apply(late, dk.compose(patches))  # a server that comes late catches up in one go
    assert dk.chain_position(late) == stream.position
    try:
        dk.apply(late, patches[3])
    except dk.DeltakitError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
