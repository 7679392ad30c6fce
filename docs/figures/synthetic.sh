# Sourced by the scripts here that make synthetic brains, which set `work`: nnU-Net's folders, and a small pre-training.
device=${device:-cpu}
export nnUNet_raw=$work/nnUNet_raw nnUNet_preprocessed=$work/nnUNet_preprocessed nnUNet_results=$work/nnUNet_results
mkdir -p "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results"

pretrain() {  # RECIPE [SETTING=VALUE ...]: the sizes of nnssl_demo
    recipe=$1
    shift
    nnssl_pretrain -c "$recipe" -device "$device" --set swin.embed_dim=16 swin.depths=1,1,1 swin.num_heads=1,2,4 \
        swin.window_size=4 patch_size=32,32,32 batch_size=4 masked.unpaired_batch_size=1 queue_size=256 \
        learning_rate=5e-4 workers=1 log_every=25 "$@"
}
