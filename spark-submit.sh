#!/usr/bin/env bash
# Runs jobs of this project on Spark:
#
#     ./spark-submit.sh [options of spark-submit …] JOB [--flag value …] [then JOB [--flag value …] …]
#     ./spark-submit.sh --archive FILE.zip    # only packs what a plain spark-submit needs for --py-files
#
# Without a master the job runs on this machine. The job's Python starts first and starts Spark itself, with the options
# given here: under spark-submit it would have no standard input, its errors would come out as output, and a signal would
# reach the JVM instead of it. `--deploy-mode cluster` is the exception: there spark-submit hands all to the cluster.
set -euo pipefail

repo=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

usage() {
    echo "usage: ./spark-submit.sh [options of spark-submit …] JOB [--flag value …] [then JOB [--flag value …] …]"
    echo "JOB --help explains a job; \`then\` begins the next one, in the same Spark, where the last ended with 0. The jobs:"
    local file name
    for file in "$repo"/jobs/*.py; do
        name=$(basename "$file" .py)
        case $name in main | __*) continue ;; esac
        printf '  %-20s %s\n' "$name" "$(sed -n '1s/^"""//; 1s/"""$//; 1p' "$file")"
    done
}

wrong() {
    printf 'spark-submit.sh: %s\n' "$1" >&2
    usage >&2
    exit 2
}

python=$repo/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3 || true)
find_spark='import importlib.util as i; print(i.find_spec("pyspark").submodule_search_locations[0])'
if ! spark_home=$("${python:-false}" -c "$find_spark" 2>/dev/null); then
    echo "spark-submit.sh: pyspark is neither in $repo/.venv nor in the python3 on PATH; install it: make -C '$repo' setup" >&2
    exit 2
fi

# Packs the project's code into the zip file $1, with the demo's adapter where $2 is given; equal code, equal bytes.
pack() {
    "$python" - "$repo" "$@" <<'EOF'
import sys, zipfile
from pathlib import Path

repo, target = map(Path, sys.argv[1:3])
files = [f for room in ("schemas", "udfs", "partitioner", "jobs", "demo") for f in (repo / room).glob("*.py")]
with zipfile.ZipFile(target, "w") as archive:
    # The demo's adapter goes only into an archive that must do without the checkout: it is ten times all the rest.
    files += [*(repo / "demo").glob("*.json"), *(repo / "demo" / "adapter").glob("*.*" if sys.argv[3:] else "*.json")]
    for file in sorted(files):
        archive.writestr(zipfile.ZipInfo(file.relative_to(repo).as_posix()), file.read_bytes(), zipfile.ZIP_DEFLATED)
EOF
}

# Options come as `--option value` or `--option=value`; those in the second line alone have no value. The first word that
# is neither an option nor an option's value is the job.
options=() jars='' files='' master='' mode=client
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        -v | --verbose | --version | --supervise | --usage-error) options+=("$1") && shift && continue ;;
        -*=*) option=${1%%=*} value=${1#*=} && shift ;;
        -*)
            [ $# -ge 2 ] || wrong "$1 needs a value"
            option=$1 value=$2 && shift 2
            ;;
        *) break ;;
    esac
    case $option=$value in
        --archive=*)
            mkdir -p "$(dirname "$value")"
            pack "$value" whole
            echo "$value"
            exit 0
            ;;
        # Spark takes the last of each of these, and needs the caller's and ours.
        --jars=*) jars+=,$value && continue ;;
        --py-files=*) files+=,$value && continue ;;
        --deploy-mode=*) mode=$value ;;
        --master=* | --properties-file=* | *=spark.master=*) master=given ;;
    esac
    options+=("$option" "$value")
done
[ $# -gt 0 ] || wrong 'which job?'
case $1 in main | _* | *[!a-z0-9_]*) wrong "there is no job '$1'" ;; esac
[ -f "$repo/jobs/$1.py" ] || wrong "there is no job '$1'"

export SPARK_HOME=$spark_home PYSPARK_PYTHON=${PYSPARK_PYTHON:-$python}
TAOSR1_CACHE=$(readlink -m "${TAOSR1_CACHE:-$repo/.cache}")
export TAOSR1_CACHE
mkdir -p "$TAOSR1_CACHE/jars" "$TAOSR1_CACHE/archives"
scratch=$(mktemp -d "$TAOSR1_CACHE/submit.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

# What Spark must be told stands in schemas/delta.py: the package first, then the settings, with `local` before those
# that are for one machine.
(cd "$repo" && "$python" -) >"$scratch/settings" <<'EOF'
from schemas.delta import CONF, LOCAL_CONF, PACKAGE

settings, local = ([f"{key}={value}" for key, value in conf.items()] for conf in (CONF, LOCAL_CONF))
print(PACKAGE, *settings, "local", *local, sep="\n")
EOF
# Spark takes the job for a shell, and would draw progress bars.
conf=(--conf spark.ui.showConsoleProgress=false)
while read -r setting; do
    if [ "$setting" != local ]; then
        conf+=(--conf "$setting")
    elif [ -z "$master" ]; then
        # A task may fail three times before the job does, as on a cluster.
        conf+=(--master 'local[*,4]')
    else
        break
    fi
done < <(tail -n +2 "$scratch/settings")

# Maven Central is asked once for each version; afterwards a start is quiet, 2 s quicker, and needs no network.
package=$(head -n 1 "$scratch/settings")
delta=$TAOSR1_CACHE/jars/${package//:/_}
if [ ! -d "$delta" ]; then
    echo "fetching $package and the jars it needs into $delta (once)" >&2
    echo pass >"$scratch/nothing.py"
    if ! "$SPARK_HOME/bin/spark-submit" "${options[@]}" --master local --deploy-mode client --packages "$package" \
        --conf "spark.jars.ivy=$scratch/ivy" "$scratch/nothing.py" >"$scratch/log" 2>&1; then
        cat "$scratch/log" >&2
        echo "spark-submit.sh: $package could not be fetched from Maven Central; a mirror can be named with" \
            "--repositories URL before the job" >&2
        exit 1
    fi
    # Of two first runs the quicker one's folder stays.
    mv -T "$scratch/ivy/jars" "$delta" 2>/dev/null || [ -d "$delta" ]
fi

# Workers that start hours from now still load it: so it is named by its content, and neither changed nor removed.
# A driver on the cluster has no checkout, and needs the demo's adapter too.
pack "$scratch/taosr1.zip" $([ "$mode" = client ] || echo whole)
archive=$TAOSR1_CACHE/archives/taosr1-$(sha256sum "$scratch/taosr1.zip" | cut -c 1-16).zip
mv "$scratch/taosr1.zip" "$archive"
rm -rf "$scratch"

jars=$(printf '%s,' "$delta"/*.jar)${jars#,}
submit=("${conf[@]}" --jars "${jars%,}" --py-files "$archive$files" "${options[@]}")
export SPARK_SUBMIT_OPTS="\"-Dlog4j2.configurationFile=file:$repo/log4j2.properties\" ${SPARK_SUBMIT_OPTS:-}"
if [ "$mode" = cluster ]; then
    exec "$SPARK_HOME/bin/spark-submit" "${submit[@]}" "$repo/jobs/main.py" "$@"
fi
# Quoted by what pyspark splits them with: the shell's own quoting writes letters beyond ASCII otherwise in the C locale.
PYSPARK_SUBMIT_ARGS="$("$python" -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' "${submit[@]}") pyspark-shell"
export PYSPARK_SUBMIT_ARGS
exec "$python" "$repo/jobs/main.py" "$@"
