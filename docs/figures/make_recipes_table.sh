#!/bin/sh
# The table of docs/finetuning.md on synthetic brains: everything from the scans to the report, on a CPU.
# Usage, from the repository's root, in the environment of nnunet_ssl: sh docs/figures/make_recipes_table.sh WORK
# If the study is interrupted, `nnssl_study run recipes -device cpu` goes on, with nnU-Net's variables set as below.
set -e
work=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
export nnUNet_raw=$work/raw nnUNet_preprocessed=$work/preprocessed nnUNet_results=$work/results
mkdir -p "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results"

python -m nnunet_ssl.phantom fomo "$work/fomo" -n 40 --voxel-mm 6
python "$root/dataset_conversion/Dataset500_FOMO60K.py" -i "$work/fomo"
nnssl_prepare -d 500 -np 2 --spacing 6 6 6
nnssl_pretrain -c mcl_mim -device cpu --set swin.embed_dim=16 swin.depths=1,1,1 swin.num_heads=1,2,4 \
    swin.window_size=4 patch_size=32,32,32 batch_size=4 masked.unpaired_batch_size=1 queue_size=256 steps=400 \
    learning_rate=5e-4 workers=1 log_every=25 validation.every=200 validation.fraction=0.1

python -m nnunet_ssl.phantom atlas "$work/ATLAS_2" -n 50 --voxel-mm 6
python "$root/dataset_conversion/Dataset501_ATLASv2.py" -i "$work/ATLAS_2" -np 2
nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres -np 2 -npfp 2

nnssl_study run recipes -device cpu
nnssl_study collect recipes -device cpu
