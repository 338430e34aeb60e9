"""Many adapters, compared fairly: cells, gangs, machines that share a folder.

grid      config of a sweep → cells, each a run of its own
leases    who works on what
gang_run  trains the cells of one gang, and resumes
closing   what is done once all cells have ended: truncations, samples
worker    takes jobs from the folder until none is left
results   reads what they wrote, and chooses each rank's learning rate
"""
