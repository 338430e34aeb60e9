"""One pure training step, and what it is made of.

step       the step itself, and the forward pass that evaluation shares
state      what a step changes
losses     cross-entropy from hidden states, without logits; `vocabulary_walk`
           is how
optimizer  AdamW under a freeze
sharding   mesh axes for axis letters
compiler   what a compiled step is asked for, and whether it fits
"""
