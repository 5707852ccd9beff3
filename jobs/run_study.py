"""Entry point of a study as a plain Ray job, where medssl is installed in the cluster's image:

ray job submit --address http://HEAD:8265 --working-dir jobs -- python run_study.py STUDY.yaml --store s3://bucket/medssl

`medssl submit` does the same, sends the package along, refuses what the cluster cannot run and follows the job.
"""

import sys

from medssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
