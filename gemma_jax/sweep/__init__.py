"""Many adapters, compared fairly: trials, batches of them, machines that share a folder.

grid        config of a sweep → trials, each a run of its own
plan        trials → batches that fit in memory
leases      which machine works on which job
evaluation  trials that are evaluated and not trained
trials      trains one batch of trials, and resumes it
manifest    what the folder holds: trials, jobs, held-out records
results     reads what was written, and chooses each rank's learning rate
finalize    what is done once all trials have ended: truncations, samples
forecast    what a sweep's batches need on a TPU slice that is not here
worker      takes jobs from the folder until none is left
"""
