"""What a sweep's results say: NumPy and SciPy over the files that it wrote.

intervals   a mean difference over seeds and records, its error, Holm
arms        each arm at its own best rate; losses paired by seed and record
verdict     which rank is enough: a fixed sequence against the largest
compare     pairs of arms, categories, truncated adapters: for exploration
words       the result in words, beginning with what limits it
tables      the results as CSV
spectra     singular values, effective rank and shared directions of adapters
"""
