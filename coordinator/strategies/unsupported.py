"""Rules that operators may look for, why this architecture has no place for them, what is nearest.

A plan fixes theta: its length, the rank of every adapter and the base below it are the same on all
devices and in all rounds, and every device makes the server's step itself on one opened vector.
"""

LORA_RULES = {
    "flora": "FLoRA (arXiv:2409.05976) stacks the devices' adapters, which grow with every round, "
    "while a plan fixes theta's length; the nearest that is exact as well is 'ffa' or 'rolora'",
    "flexlora": "FlexLoRA (arXiv:2402.11505) decomposes the sum of the devices' products B A, "
    "which no update holds; the nearest that averages products exactly is 'ffa' or 'rolora'",
    "fedex": "FedEx-LoRA (arXiv:2410.09432) adds a residual to the base in every round, while a "
    "plan's base is fixed by its hash; the nearest that leaves no residual is 'ffa' or 'rolora'",
}
