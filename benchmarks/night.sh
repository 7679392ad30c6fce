#!/usr/bin/env bash
# What takes one GPU a night: does it work, what does it cost, what do the recipes learn. Start it and go to bed:
#
#     nohup benchmarks/night.sh FOLDER &          in the package's environment; FOLDER is made, and may be given again
#
# FOLDER gets a file for each part, as it ends; a part whose file is there is not done again, so that a night that was
# cut short goes on with the same command. A part that fails leaves FOLDER/<part>.failed and the others go on.
#
#     night_parts="check price" benchmarks/night.sh FOLDER       some parts only
#     night_options="-device cpu" night_python=echo ...          another device; another Python, or none, to see commands
set -uo pipefail
folder=${1:?usage: benchmarks/night.sh FOLDER}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."
options=${night_options:--device cuda}

part() {  # name, what it is, the command
    local name=$1 what=$2
    shift 2
    case " ${night_parts:-check attention encoder price price_resenc price_memory price_recipes recipes recipes_resenc} " in *" $name "*) ;; *) return ;; esac
    [ -e "$folder/$name.txt" ] && echo "$name: done" && return
    echo "$(date '+%F %T')  $name: $what"
    if "$@" >"$folder/$name.running" 2>"$folder/$name.log"; then
        mv "$folder/$name.running" "$folder/$name.txt"
        rm -f "$folder/$name.failed"
    else
        mv "$folder/$name.running" "$folder/$name.failed"
        echo "$(date '+%F %T')  $name failed: see $folder/$name.failed and $name.log"
    fi
}

python=${night_python:-python}
price="$python benchmarks/pretraining.py $options workers=12"

part check "everything on this GPU, 5 minutes" $python benchmarks/gpu_check.py $options
part attention "window attention by stage" $python benchmarks/attention.py $options
part encoder "the encoder against MONAI's at batch 32" \
    $python benchmarks/encoder.py $options --sizes 96 --batch-size 32 --compile
part price "a step of mcl_mim, its variants, and around MONAI's encoder" \
    $price --peer monai --also compile=false shared_pass=true bf16=false swin.window_size=6
part price_resenc "a step on the other backbone" \
    $price backbone=resenc --also compile=false shared_pass=true
part price_memory "what accumulation and checkpointing trade" \
    $price --also accumulation=2 accumulation=4 checkpointing=true "accumulation=4 checkpointing=true"
part price_recipes "a step of every other recipe" bash -c \
    "for recipe in cl mcl mim cl_mim mcl_mim_balanced mcl_ibot mcl_path mcl_dense; do $price -c \$recipe || exit 1; done"

real="swin.embed_dim=48 swin.depths=2,2,6,2 swin.num_heads=3,6,12,24 swin.window_size=7
resenc.features=null resenc.blocks=null patch_size=96 batch_size=16 masked.unpaired_batch_size=8 queue_size=4096 workers=12"
learn="$python benchmarks/recipes.py $options -w $folder/brains --steps 5000 --voxel_mm 1"
part recipes "what every recipe learns in 5,000 steps on synthetic brains: hours" $learn --set $real
part recipes_resenc "the same on the other backbone" $learn --backbone resenc --set $real
echo "$(date '+%F %T')  The night is over: $(find "$folder" -name '*.txt' | wc -l) parts done, $(find "$folder" -name '*.failed' | wc -l) failed"
[ -z "$(find "$folder" -name '*.failed')" ]
