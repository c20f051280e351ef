# shellcheck shell=bash disable=SC2034,SC2154  # variables shared with the scripts that source this file
# Shared by tpu.sh, gke.sh and slurm.sbatch: messages, quoting, checks, and commands that --dry-run prints.

dry_run=0
options=""         # the --env option of this call, repeated in the messages that name the next command
arguments=()       # the trainer's, after --
go_on="try again"  # the advice to print if the next command fails

say() { printf '%s\n' "$*" >&2; }

refuse() {
  say "$*"
  exit 2
}

# Prints words as one line that a shell parses into the same words.
quoted() {
  local word flag line="" quote="'\\''"
  for word in "$@"; do
    flag=""
    [[ $word =~ ^--[a-z-]+= ]] && flag=${BASH_REMATCH[0]} && word=${word#"$flag"}  # more readable: --flag='a value'
    if [[ $word == *[[:cntrl:]]* ]]; then
      printf -v word %q "$word"  # a line break must not end the line
    elif [[ -z $flag$word || $word == *[!A-Za-z0-9_./:=@%+,-]* ]]; then
      word="'${word//\'/"$quote"}'"
    fi
    line+=" $flag$word"
  done
  printf '%s' "${line# }"
}

# Runs a command, or prints it; a failure ends the script with a message.
call() {
  if ((dry_run)); then
    quoted "$@"
    echo
    return
  fi
  local status=0
  "$@" || status=$?
  ((status == 0)) && return
  say "The step $step failed: $1 ended with status $status (its output is above); to resume, $go_on."
  exit 1
}

# Reads NAME=VALUE lines without running the file as a program; a misspelt name is an error.
read_env() {
  local file=$1 line name
  shift
  [[ -f $file ]] || refuse "--env must be a file of NAME=VALUE lines, but $PWD has no file $(quoted "$file")."
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    name=${line%%=*}
    [[ $line == *=* && " $* " == *" $name "* ]] ||
      refuse "Lines of $file must be NAME=VALUE with one of the names $*, got $(quoted "$line")."
    printf -v "$name" %s "${line#*=}"
  done <"$file"
}

# Reads COMMAND [--dry-run] [--env=FILE] [-- ARGUMENTS]; the names that an env file may set come first, before ':'.
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
      *) refuse "Unknown argument $(quoted "$1"): it must be --dry-run or --env=FILE; put the trainer's arguments after --." ;;
    esac
  done
}

# Checks NAME=EXAMPLE pairs: reports all variables without a value at once, and refuses values that a shell could
# misread or that lead out of a folder.
check_variables() {
  local pair name missing="" LC_ALL=C
  for pair in "$@"; do
    name=${pair%%=*}
    [[ -n ${!name:-} ]] || missing+="${missing:+, }$name (for example $pair)"
  done
  [[ -z $missing ]] || refuse "Set $missing in the environment or in a file given by --env=FILE."
  for pair in "$@"; do
    name=${pair%%=*}
    local pattern='^[a-z0-9][a-z0-9._:-]*$' words="lower-case letters, digits and . _ : -"
    [[ $name == IMAGE ]] && pattern='^[a-z0-9][A-Za-z0-9._:/@-]*$' words="letters, digits and . _ : / @ -"
    [[ ${!name} =~ $pattern ]] ||
      refuse "$name must be $words after a first letter or digit (for example $pair), got $(quoted "${!name}")."
  done
}

# Checks NAME=PATTERN pairs of numbers that have defaults.
check_numbers() {
  local pair name
  for pair in "$@"; do
    name=${pair%%=*}
    [[ ${!name} =~ ^(${pair#*=})$ ]] || refuse "$name must be a number that matches ${pair#*=}, got $(quoted "${!name}")."
  done
}
