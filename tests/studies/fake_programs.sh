#!/bin/sh
# Stands for every program that a study calls: notes its call, and leaves what the real one would leave.
name=$(basename "$0")
echo "$name $* settings=$nnssl_settings checkpoint=$nnssl_checkpoint" >> "$FAKE_CALLS"
case "$name $*" in $FAKE_FAILS) echo "out of memory"; exit 3 ;; $FAKE_HANGS) sleep 60 ;; $FAKE_FORGETS) exit 0 ;; esac

option() {  # the value behind $1 in the rest
    wanted=$1; shift
    while [ $# -gt 0 ]; do [ "$1" = "$wanted" ] && { echo "$2"; return; }; shift; done
}
suffix=$(echo "$nnssl_settings" | tr -d '=' | tr ',' '_')

case $name in
nnUNetv2_train)
    dataset=$(basename "$nnUNet_raw"/Dataset"$1"_*)
    fold=$nnUNet_results/$dataset/$(option -tr "$@")__$(option -p "$@")${suffix:+_$suffix}__$2/fold_$3
    mkdir -p "$fold/validation"
    echo done > "$fold/checkpoint_final.pth"
    echo '{}' > "$fold/validation/summary.json" ;;
nnUNetv2_predict)
    mkdir -p "$(option -o "$@")"
    echo predicted > "$(option -o "$@")/case.nii.gz" ;;
nnssl_pretrain)
    for word; do case $word in recipe=*) run=${word#recipe=} ;; esac; done
    results=$nnUNet_results/$(basename "$nnUNet_preprocessed"/Dataset"$(option -d "$@")"_*)/$run
    mkdir -p "$results"
    printf 'step,validation/error/t1\n10,0.5\n20,0.4\n' > "$results/progress.csv"
    echo done > "$results/encoder.safetensors" ;;
maker)
    mkdir -p "$nnUNet_preprocessed/Dataset500_Made" ;;
nnssl_evaluate)
    mkdir -p "$(option -o "$@")"
    echo '{"cases": []}' > "$(option -o "$@")/lesions.json"
    echo '{}' > "$(option -o "$@")/alignment.json"
    echo '{"scores": {"R2": {"value": 0.5}}}' > "$(option -o "$@")/probe.json" ;;
esac
