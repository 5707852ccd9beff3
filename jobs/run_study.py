r"""Entry point of a study as a plain Ray job, where medssl is installed in the cluster's image:

ray job submit --address http://HEAD:8265 --working-dir jobs \
  --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}' \
  -- python run_study.py STUDY.yaml --store s3://bucket/medssl

The variable is the time that a stopped job has for its step and checkpoint; without it Ray kills it after three seconds.
`medssl submit` does the same, sends the package along, refuses what the cluster cannot run and follows the job.
"""

import sys

from medssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
