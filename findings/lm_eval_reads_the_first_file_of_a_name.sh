#!/bin/sh
# lm_eval 0.4.13: a directory of tasks of one's own (include_path) with three task files: "spelling",
# a later version of it in another file of the same name of task, and one that is not quite YAML.
#
# One would expect an error, a warning, or the file that was read last, as with a built-in task that
# one's own takes the place of. The first by its path is taken and the other two are left out, both
# with a line at level DEBUG alone, so that an evaluation of "all in this directory" is of fewer tasks.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 lm_eval==0.4.13 datasets==5.2.0 numpy==2.4.6
mkdir "$place/tasks"
for version in 1 2; do
    cat > "$place/tasks/spelling_$version.yaml" <<YAML
task: spelling
dataset_path: json
dataset_kwargs: {data_files: {test: $place/questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "version $version: {{question}}"
doc_to_target: "{{answer}}"
YAML
done
sed 's/task: spelling/task: reading\n  shots: [1/' "$place/tasks/spelling_1.yaml" \
    > "$place/tasks/reading.yaml"
echo '{"question": "a b", "answer": "ab"}' > "$place/questions.jsonl"
cat > "$place/tasks.py" <<'PYTHON'
import logging
import sys

from lm_eval.tasks import TaskManager

logging.basicConfig(level=logging.INFO)
manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
print(sorted(manager.all_tasks), end=" ")
[task] = manager.load(["spelling"])["tasks"].values()
print(task.config.doc_to_text[:9])
PYTHON
said=$(HF_HOME="$place/home" HF_HUB_OFFLINE=1 \
    "$place/venv/bin/python" "$place/tasks.py" "$place/tasks" 2> "$place/errors") ||
    { cat "$place/errors"; exit 1; }
echo "tasks, and the prompt of spelling: $said"
[ "$said" = "['spelling'] version 1" ]
! grep -q "spelling_2\|reading" "$place/errors"
