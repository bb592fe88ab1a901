"""Sample from a model: `python -m nanogpt_fast.sample --out_dir=out --start="..."`. Flags are nanoGPT's, and more."""

from nanogpt_fast.command import importing, run_command
from nanogpt_fast.settings import cli
from nanogpt_fast.settings.sampling import SampleConfig

EPILOG = """\
These draw a token, in this order, which is that of Hugging Face's generate:
repetition_penalty, temperature, top_k, top_p, min_p, then the softmax once.

A line of --format=jsonl: prompt_index, sample_index, prompt, text (without what
--stop names), tokens, finish_reason (length, stop or eot), logprob (natural, of
all tokens together, by the model itself, before all of the above), seed.

examples:
  python -m nanogpt_fast.sample --start="FILE:prompt.txt" --num_samples=3
  python -m nanogpt_fast.sample --prompts=prompts.txt --batch_size=16 \\
      --top_k=0 --top_p=0.9 --stop='\\n\\n' --format=jsonl > samples.jsonl"""


def main(argv: list[str]) -> None:
    """Print num_samples samples, each with its prompt and nanoGPT's separator after it."""
    description = "Print text that a model continues from --start."
    config = cli.parse(SampleConfig, argv, prog="python -m nanogpt_fast.sample", description=description, epilog=EPILOG)
    with importing():  # torch, a second that --help and a wrong flag do without
        from nanogpt_fast.samples import write_samples

    write_samples(config)


if __name__ == "__main__":
    run_command(main, again="the samples end here; the same command draws the same ones again")
