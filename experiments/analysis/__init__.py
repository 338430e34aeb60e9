"""What a sweep's results say: NumPy and SciPy over the files that it wrote.

intervals   paired bootstrap over seeds and records, corrected p-values
compare     arms of a sweep against the best one, in numbers and in words
spectra     singular values, effective rank and shared directions of adapters
"""
