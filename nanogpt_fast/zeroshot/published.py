"""What GPT-2's paper says of its four sizes, and what others have measured of the same weights.

Paper: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 3. It does not say what each
column divides by, and its two WikiText columns are of one test set. Where somebody has reached a column's figure by a
known convention, the column stands beside that convention here; else beside the paper's own rule, original tokens.
"""

SIZES = ("117M", "345M", "762M", "1542M")

# {(task, metric): the paper's figures by size}
PAPER: dict[tuple[str, str], tuple[float, float, float, float]] = {
    ("lambada", "perplexity/word"): (35.13, 15.60, 10.87, 8.63),
    ("lambada", "accuracy/filtered"): (0.4599, 0.5548, 0.6012, 0.6324),
    ("cbt_cn", "accuracy"): (0.8765, 0.9235, 0.9345, 0.9330),
    ("cbt_ne", "accuracy"): (0.834, 0.871, 0.880, 0.8905),
    ("wikitext2", "perplexity/token"): (29.41, 22.76, 19.93, 18.34),
    ("ptb", "perplexity/original"): (65.85, 47.33, 40.31, 35.76),
    ("enwik8", "bits/byte"): (1.16, 1.01, 0.97, 0.93),
    ("text8", "bits/character"): (1.17, 1.06, 1.02, 0.98),
    ("wikitext103", "perplexity/word"): (37.50, 26.37, 22.05, 17.48),
    ("1bw", "perplexity/original"): (75.20, 55.72, 44.575, 42.16),
}

TASKS = list(dict.fromkeys(task for task, _ in PAPER))  # in the order of the paper's table

# {(task, metric): (what others measured of OpenAI's weights, where they say so)}
OTHERS: dict[tuple[str, str], tuple[str, str]] = {
    ("wikitext2", "perplexity/token"): (
        "117M 29.94, 762M 19.44, by windows of 1024 that do not overlap; 762M 16.45 by a stride of 512",
        "transformers' page on perplexity; huggingface/transformers #13761",
    ),
    ("wikitext103", "perplexity/word"): (
        "117M 37.37, lm-eval's word_perplexity of WikiText-2's test set, page by page",
        "huggingface/transformers #13761",
    ),
    ("lambada", "accuracy/word"): ("117M 0.3256, lm-eval's lambada_openai", "lm-evaluation-harness #2159"),
    ("lambada", "accuracy/token"): ("117M 0.4667", "huggingface/transformers #13761"),
    ("lambada", "perplexity/word"): (
        "117M 40.06, 1542M 10.63, lm-eval's lambada_openai",
        "lm-evaluation-harness #2159, #911",
    ),
    ("lambada_openai", "acc"): ("117M 0.3256", "lm-evaluation-harness #2159"),
    ("lambada_openai", "perplexity"): ("117M 40.06, 1542M 10.63", "lm-evaluation-harness #2159, #911"),
    ("wikitext", "word_perplexity"): ("117M 37.37", "huggingface/transformers #13761"),
    ("cbt_cn", "accuracy"): ("117M 0.8435", "huggingface/transformers #13761"),
    ("cbt_ne", "accuracy"): ("117M 0.7365", "huggingface/transformers #13761"),
    ("ptb", "perplexity/token"): ("117M 52.53", "huggingface/transformers #13786"),
    ("ptb", "perplexity/word"): ("117M 79.65", "huggingface/transformers #13786"),
    ("hellaswag", "acc"): ("117M 0.2892, 1542M 0.4004", "llm.c, dev/data/hellaswag.py"),
    ("hellaswag", "acc_norm"): ("117M 0.3114, 1542M 0.5089", "llm.c, dev/data/hellaswag.py"),
}
