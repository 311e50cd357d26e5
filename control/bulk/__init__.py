"""Images scored in bulk: an archive's own code answers a whole folder or table, on one machine or many.

command.py is the command `score`, plan.py decides what is to do, source.py cuts the input into shards, scorer.py
answers a shard, output.py writes one Parquet file for each, on_ray.py spreads the shards over a cluster and is the only
module that imports Ray. What runs on the cluster's machines (`scorer`, and what it calls here) travels there with the
job, so those modules import nothing else of gradserve.
"""
