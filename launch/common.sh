# shellcheck shell=bash disable=SC2034,SC2154  # variables shared with the scripts that source this file
# What tpu.sh, gke.sh and slurm.sbatch share: sentences, quoting, checks, and commands that --dry-run prints.

dry_run=0
options=""         # how this script was told where its variables are, repeated in the sentences that say how to go on
arguments=()       # what stands after --
go_on="try again"  # what to do when the next command fails

say() { printf '%s\n' "$*" >&2; }

refuse() {
  say "$*"
  exit 2
}

# Prints words in one line from which a shell reads the same words.
quoted() {
  local word flag line="" quote="'\\''"
  for word in "$@"; do
    flag=""
    [[ $word =~ ^--[a-z-]+= ]] && flag=${BASH_REMATCH[0]} && word=${word#"$flag"}  # --flag='a value' reads best
    if [[ $word == *[[:cntrl:]]* ]]; then
      printf -v word %q "$word"  # a line break must not end the line
    elif [[ -z $flag$word || $word == *[!A-Za-z0-9_./:=@%+,-]* ]]; then
      word="'${word//\'/"$quote"}'"
    fi
    line+=" $flag$word"
  done
  printf '%s' "${line# }"
}

# Runs a command, or prints it; a failure ends the script with a sentence.
call() {
  if ((dry_run)); then
    quoted "$@"
    echo
    return
  fi
  local status=0
  "$@" || status=$?
  ((status == 0)) && return
  say "The step $step failed: $1 ended with status $status, and what it says stands above; to go on, $go_on."
  exit 1
}

# Takes NAME=VALUE lines without running the file as a program, so a misspelt name is an error and nothing else happens.
read_env() {
  local file=$1 line name
  shift
  [[ -f $file ]] || refuse "--env=$file names no file seen from $PWD; it takes a file of NAME=VALUE lines."
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    name=${line%%=*}
    [[ $line == *=* && " $* " == *" $name "* ]] ||
      refuse "$file holds the line $(quoted "$line"), but takes NAME=VALUE lines with the names $*."
    printf -v "$name" %s "${line#*=}"
  done <"$file"
}

# Reads COMMAND [--dry-run] [--env=FILE] [-- ARGUMENTS]; the names that an env file may set come first, up to ':'.
read_command() {
  local names=()
  while [[ $1 != : ]]; do names+=("$1") && shift; done
  shift
  command=${1:-}
  while (($# > 1)); do
    shift
    case $1 in
      --dry-run) dry_run=1 ;;
      --env=*) read_env "${1#--env=}" "${names[@]}" && options=" $(quoted "$1")" ;;
      --) shift && arguments=("$@") && return ;;
      *) refuse "The argument $(quoted "$1") is unknown: --dry-run and --env=FILE are accepted, and what the trainer takes stands after --." ;;
    esac
  done
}

# Takes NAME=EXAMPLE pairs: every variable that lacks a value is named at once, and values that a shell could misread
# or that lead out of a folder are refused.
check_variables() {
  local pair name missing="" LC_ALL=C
  for pair in "$@"; do
    name=${pair%%=*}
    [[ -n ${!name:-} ]] || missing+="${missing:+, }$name (for example $pair)"
  done
  [[ -z $missing ]] || refuse "Set $missing in the environment or in a file given by --env=FILE."
  for pair in "$@"; do
    name=${pair%%=*}
    local accepted='^[a-z0-9][a-z0-9._:-]*$' words="lower-case letters, digits and . _ : -"
    [[ $name == IMAGE ]] && accepted='^[a-z0-9][A-Za-z0-9._:/@-]*$' words="letters, digits and . _ : / @ -"
    [[ ${!name} =~ $accepted ]] ||
      refuse "$name is $(quoted "${!name}"), but takes $words after a first letter or digit, for example $pair."
  done
}

# Takes NAME=PATTERN pairs of numbers that have defaults.
check_numbers() {
  local pair name
  for pair in "$@"; do
    name=${pair%%=*}
    [[ ${!name} =~ ^(${pair#*=})$ ]] || refuse "$name is $(quoted "${!name}"), but takes a number that matches ${pair#*=}."
  done
}
