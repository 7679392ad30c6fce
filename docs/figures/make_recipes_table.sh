#!/bin/sh
# The table of docs/how-to/run-a-study.md on synthetic brains: everything from the scans to the report, on a CPU.
# Usage, from the repository's root, in the environment of nnunet_ssl: sh docs/figures/make_recipes_table.sh WORK
# If the study is interrupted, `nnssl_study run recipes -device cpu` goes on, with nnU-Net's variables set as in synthetic.sh.
set -e
work=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
. "$root/docs/figures/synthetic.sh"

python -m nnunet_ssl.phantom fomo "$work/fomo" -n 30 --voxel_mm 4
python "$root/dataset_conversion/Dataset500_FOMO60K.py" -i "$work/fomo"
nnssl_prepare -d 500 -np 2 --spacing 4 4 4
pretrain mcl_mim steps=400 validation.every=200 validation.fraction=0.1

python -m nnunet_ssl.phantom atlas "$work/ATLAS_2" -n 50 --voxel_mm 4
python "$root/dataset_conversion/Dataset501_ATLASv2.py" -i "$work/ATLAS_2" -np 2
nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres -np 2 -npfp 2

nnssl_study run recipes -device "$device" & # a core each
nnssl_study run recipes -device "$device"
wait
nnssl_study collect recipes -device "$device"
