#!/bin/sh
# The examples of docs/how-to/measure.md and run-a-study.md on synthetic brains: everything from the scans to the figures, on a CPU.
# Usage, from the repository's root, in the environment of nnunet_ssl: sh docs/figures/make_evaluation_figures.sh WORK
set -e
work=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
export nnUNet_raw=$work/nnUNet_raw nnUNet_preprocessed=$work/nnUNet_preprocessed nnUNet_results=$work/nnUNet_results
mkdir -p "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results"

python -m nnunet_ssl.phantom fomo "$work/fomo" -n 24 --voxel_mm 4
python "$root/dataset_conversion/Dataset500_FOMO60K.py" -i "$work/fomo"
nnssl_prepare -d 500 --spacing 4 4 4
for recipe in mcl_mim cl_mim mcl_mim_balanced; do
    nnssl_pretrain -c $recipe -d 500 -device cpu --set swin.embed_dim=12 swin.depths=1,1,1,1 \
        swin.num_heads=1,2,2,2 swin.window_size=4 patch_size=64,32,32 batch_size=4 queue_size=64 \
        masked.unpaired_batch_size=2 steps=150 workers=0 log_every=5 gradients_every=1 save_every=150 \
        validation.fraction=0.3 validation.every=75 validation.batches=2
done

python -m nnunet_ssl.phantom atlas "$work/ATLAS_2" -n 20 --voxel_mm 4
python "$root/dataset_conversion/Dataset501_ATLASv2.py" -i "$work/ATLAS_2" -np 2
python -m nnunet_ssl.phantom isles "$work/ISLES-2022" -n 20 --voxel_mm 4
python "$root/dataset_conversion/Dataset502_ISLES2022.py" -i "$work/ISLES-2022" --channels dwi -np 2
nnUNetv2_plan_and_preprocess -d 501 510 -c 3d_fullres -np 1 -npfp 1

nnssl_study run "$root/docs/figures/example_study.yaml" -device cpu
nnssl_study collect "$root/docs/figures/example_study.yaml"
cd "$nnUNet_results/Dataset500_FOMO60K"
nnssl_evaluate gradients mcl_mim cl_mim mcl_mim_balanced -o "$work/gradients"
nnssl_evaluate alignment --checkpoint mcl_mim -d 500 -device cpu --patch_size 32 32 32 -o "$work/alignment"
nnssl_evaluate probe --checkpoint mcl_mim -d 500 -device cpu --patch_size 32 32 32 --target modality -o "$work/probe"
first=$nnUNet_results/studies/example/results/atlas__mcl_mim__fraction100__seed0__fold0/validation

small() { python "$root/docs/figures/shrink.py" "$root/docs/figures/example_$1.png" "$2"; }
small gradients "$work/gradients/gradients.png"
small alignment "$work/alignment/alignment.png"
small probe "$work/probe/probe.png"
small lesions "$first/lesions.png"
small fractions "$nnUNet_results/studies/example/report/sample_efficiency_fractions.png"
small modalities "$nnUNet_results/studies/example/report/modalities_modalities.png"
