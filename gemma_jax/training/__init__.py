"""One pure training step, and what it is made of.

step       the step itself, and the forward pass that evaluation shares
state      what a step changes
losses     cross-entropy from hidden states, without logits, by
           `vocabulary_walk`
optimizer  AdamW under a freeze
sharding   mesh axes for axis letters
compiler   options and remat of a compiled step, and whether it fits
"""
