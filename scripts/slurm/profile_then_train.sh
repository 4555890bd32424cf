#!/usr/bin/env bash
# Submits two SLURM jobs: one that measures the cost model, and one that trains with it as soon as that is there.
#
#     scripts/slurm/profile_then_train.sh COST_MODEL.json <options of sbatch> -- pretrain_gpt.py <its arguments>
#
# Both get the same nodes and arguments. FLEXSP_PROFILE_OPTIONS holds further options of sbatch for the first alone,
# such as a shorter --time. If it fails, SLURM cancels the second.
set -euo pipefail

beside=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)

refuse() {
    printf 'profile_then_train: error: %s\n' "$*" >&2
    exit 2
}

[ $# -gt 0 ] || refuse "no arguments: $0 COST_MODEL.json <options of sbatch> -- pretrain_gpt.py <its arguments>"
cost_model=$1
shift
case $cost_model in -*) refuse "the first argument is the cost model's file, not an option: $cost_model" ;; esac
[ ! -e "$cost_model" ] || refuse "$cost_model is there already: train with it (train.sbatch ... --flexsp-cost-model" \
    "$cost_model), or move it away"

options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
[ $# -gt 1 ] || refuse "no -- before the script: sbatch's options stand before it, pretrain_gpt.py and its arguments after"
shift
for argument in "$@"; do
    case $argument in
        --flexsp-profile | --flexsp-profile=* | --flexsp-cost-model | --flexsp-cost-model=*)
            refuse "$argument: this script gives it; take it out"
            ;;
    esac
done

read -ra profile_options <<<"${FLEXSP_PROFILE_OPTIONS:-}"
profile=$(sbatch --parsable ${options[@]+"${options[@]}"} ${profile_options[@]+"${profile_options[@]}"} "$beside/profile.sbatch" \
    "$@" --flexsp-profile "$cost_model")
profile=${profile%%;*} # a federation adds the cluster's name
train=$(sbatch --parsable ${options[@]+"${options[@]}"} --dependency "afterok:$profile" --kill-on-invalid-dep=yes \
    "$beside/train.sbatch" "$@" --flexsp --flexsp-cost-model "$cost_model") || {
    scancel "$profile"
    refuse "the training job was not accepted, so the profile is cancelled too"
}
train=${train%%;*}
echo "job $profile measures $cost_model; job $train then trains with it"
