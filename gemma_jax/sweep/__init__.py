"""Many adapters, compared fairly: cells, gangs, machines that share a folder.

grid        config of a sweep → cells, each a run of its own
plan        cells → gangs that fit in memory
leases      who works on what
evaluation  held-out losses of many adapters in one pass
gang_run    trains the cells of one gang, and resumes
manifest    what the folder holds: cells, jobs, held-out records
results     reads what was written, and chooses each rank's learning rate
finalize    what is done once all cells have ended: truncations, samples
worker      takes jobs from the folder until none is left
"""
