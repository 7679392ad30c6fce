#!/usr/bin/env bash
# Models for any subset of channels on synthetic brains: docs/figures/make_missing_figure.sh WORK [CASES [SUBJECTS]]
#
# Makes a corpus, ISLES-like and FCD-like data, pre-trains cl_mim and mcl_mim at a small size, trains the study
# `missing` (40 trainings), and measures every subset on held-out cases into WORK/missing_{isles,fcd}. Interrupted, it
# goes on where it stopped. On two free x86 cores count on four to five hours (an estimate; it has not been run in full).
set -euo pipefail
shopt -s nullglob
work=$(realpath -m "$1")
cases=${2:-20}
subjects=${3:-24}
. "$(dirname "$0")/synthetic.sh"

once() {  # NAME COMMAND...: run a command unless it has succeeded before
    local mark=$work/done_$1
    shift
    [ -e "$mark" ] || { "$@" && touch "$mark"; }
}
phantom() {  # LAYOUT FOLDER N SEED
    once "phantom_$2" python -m nnunet_ssl.phantom "$1" "$work/$2" -n "$3" --seed "$4" --voxel_mm 3
}
convert() {  # MODULE FOLDER NUMBER CHANNELS...
    local module=$1 folder=$2 number=$3
    shift 3
    once "convert_$number" python -m "nnunet_ssl.conversion.$module" -i "$work/$folder" -d "$number" --channels "$@"
}

phantom fomo fomo "$subjects" 0
once index python -m nnunet_ssl.conversion.fomo60k -i "$work/fomo"
once prepare nnssl_prepare -d 500 -np 2 --spacing 3 3 3
for recipe in cl_mim mcl_mim; do
    once "pretrain_$recipe" pretrain "$recipe" "steps=${steps:-300}" validation.fraction=0.15
done

phantom isles isles "$cases" 1
phantom isles isles_held_out "$cases" 2
phantom fcd fcd "$cases" 1
phantom fcd fcd_held_out "$cases" 2
convert isles2022 isles 502 dwi adc flair
convert isles2022 isles 510 dwi
convert isles2022 isles 511 adc
convert isles2022 isles 512 flair
convert isles2022 isles 513 dwi adc
convert isles2022 isles 514 dwi flair
convert isles2022 isles 515 adc flair
convert isles2022 isles_held_out 902 dwi adc flair
convert fcd_bonn fcd 503 flair t1
convert fcd_bonn fcd 516 flair
convert fcd_bonn fcd 517 t1
convert fcd_bonn fcd_held_out 903 flair t1
once plan nnUNetv2_plan_and_preprocess -d 502 503 510 511 512 513 514 515 516 517 -c 3d_fullres -np 2

nnssl_study run "${study:-missing}" -device "$device"

measure() {  # NAME DATASET HELD_OUT PRESET
    local models=() specialists=() folder
    # a study keeps models that start from a checkpoint of their own, as from scratch, in its own folder
    for folder in "$nnUNet_results"/{,studies/missing/models/*/}Dataset"$2"_*/*channels-*__3d_fullres; do
        case $folder in
            *Scratch__*) models+=("scratch=$folder") ;;
            *CLMIM__*channels-pooled*) [[ $folder == *MCLMIM* ]] && models+=("MCL+MIM=$folder") || models+=("CL+MIM=$folder") ;;
            *channels-zeros*) models+=("zeros=$folder") ;;
            *channels-scaled*) models+=("scaled=$folder") ;;
        esac
    done
    for folder in "$nnUNet_results"/*"$1"*/nnUNetTrainerMCLMIM__*__3d_fullres; do
        [[ $folder == *channels-* ]] || specialists+=("$folder")
    done
    nnssl_evaluate missing -i "$nnUNet_raw"/Dataset"$3"_*/imagesTr -ref "$nnUNet_raw"/Dataset"$3"_*/labelsTr \
        -m "${models[@]}" --specialists "${specialists[@]}" --preset "$4" --disable_tta -device "$device" \
        -o "$work/missing_$4"
}
measure ISLES 502 902 isles
measure FCD 503 903 fcd
