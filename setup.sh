# shellcheck shell=bash disable=SC1090,SC1091,SC2016,SC2034
# Sourced by train.sh, eval.sh, test.sh, runs/laptop.sh and runs/openvla_7b.sh; or run by itself: bash setup.sh
#
#   set_up                     makes .venv with everything in it, and a Vulkan driver if nothing here can render
#   set_up_without_renderer    only .venv
#   answer_help                answers --help of a command, on a machine where nothing is set up
#
# Everything says what it does, and does nothing the second time. Afterwards "$python" runs the project.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$root/.venv/bin/python"
home="${ROBOFACTORY_HOME:-$root/robofactory}" home="${home/#\~\//${HOME:-~}/}" # as `config.home` reads it
packages_stamp="$root/.venv/set-up"           # holds the key of what is installed
renderer_stamp="$root/.venv/can-render"       # there once a picture was rendered
unfinished="$root/.venv/set-up-is-unfinished" # there while packages are being installed

stop() { # message...: one line a mistake
    printf 'error: %s\n' "$*" >&2
    exit 2
}

answer_help() { # module arguments...; without a module, with what the script says of itself
    local module="$1" argument bare
    shift
    for argument in "$@"; do
        if [[ "$argument" != -h && "$argument" != --help ]]; then continue; fi
        if [[ -n "$module" ]] && bare="$([[ -x "$python" ]] && echo "$python" || find_python 2>/dev/null)"; then
            PYTHONPATH="$root" "$bare" -m "$module" --help
        else
            sed -n -E '2,/^$/ s/^# ?//p' "$0" # the comment that it opens with
        fi
        exit 0
    done
}

# -------------------------------------------------------------------------------------------------------- packages

find_python() { # prints the first Python that is new enough, one that can make virtual environments if there is
    local candidate modules
    for modules in sys,ensurepip,venv sys; do
        for candidate in python3.11 python3.12 python3 python3.13 python3.14; do
            if "$candidate" -c "import $modules; sys.exit(not (3, 11) <= sys.version_info < (3, 15))" 2>/dev/null; then
                command -v "$candidate"
                return
            fi
        done
    done
    stop "no Python 3.11 or newer here; install one: sudo apt-get install python3 python3-venv" \
        "(Debian 12, Ubuntu 24.04 or newer)"
}

packages_key() { cat "$root/pyproject.toml" "$root/constraints.txt" - <<<"$root" | sha256sum; }

has_packages() { [[ -x "$python" && -f "$packages_stamp" && "$(<"$packages_stamp")" == "$(packages_key)" ]]; }

set_up_packages() {
    if has_packages; then return; fi
    make_environment
    touch "$unfinished"
    install_packages
    rm "$unfinished"
    packages_key >"$packages_stamp"
}

make_environment() {
    # A set-up that was cut off may have left half a package behind, which pip would take for a whole one.
    if [[ -x "$python" && ! -e "$unfinished" ]] && "$python" -m pip --version >/dev/null 2>&1; then return; fi
    local base version
    base="$(find_python)" || exit 2
    version="$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "$base cannot make virtual environments; install that: sudo apt-get install python$version-venv"
    echo "set-up: making .venv with Python $version"
    "$base" -m venv --clear "$root/.venv" || stop "could not make $root/.venv; see the lines above"
}

install_packages() {
    local log="$root/.venv/set-up.log" started=$SECONDS
    echo "set-up: installing packages into .venv (the first time a few minutes and 8 GB, most of it PyTorch)"
    : >"$log"
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 13))'; then
        # ManiSkill asks for mplib, which has no release for this Python and which nothing here imports.
        local everything="$root/.venv/everything.txt"
        grep -v -E '^(mplib|toppra|mani_skill|#)' "$root/constraints.txt" >"$everything"
        pip_install -r "$everything" && pip_install --no-deps -c "$root/constraints.txt" mani_skill &&
            pip_install --no-deps -e "$root"
    else
        pip_install -c "$root/constraints.txt" -e "${root}[sim,imports,dev]"
    fi || stop "pip could not install the packages (its last lines are above, all of them in $log)." \
        "With the network and the disk in order, run the same command again"
    echo "set-up: packages installed in $((SECONDS - started)) s"
}

pip_install() { # arguments of pip install; shows what it does, or one line every half minute where nobody watches
    local log="$root/.venv/set-up.log" line shown=0 status=0
    "$python" -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 | tee -a "$log" |
        while IFS= read -r line; do
            if [[ ! "$line" =~ ^\ *(Collecting|Downloading|Processing|Building|Installing) ]]; then continue; fi
            line="${line%%:*}" line="${line%% (from*}" line="${line/Processing *\//Processing }"
            if [[ -t 1 ]]; then
                printf '\r\033[K  %4d s  %.70s' "$SECONDS" "$line"
            elif ((SECONDS >= shown + 30)); then
                printf '  %4d s  %.70s\n' "$SECONDS" "$line"
                shown=$SECONDS
            fi
        done || status=$?
    if [[ -t 1 ]]; then printf '\r\033[K'; fi
    if ((status)); then grep -v '^ *$' "$log" | tail -n 5 >&2; fi
    return "$status"
}

# ------------------------------------------------------------------------------------------------------ the driver

# Found by rendering a picture, in a process of its own: a driver that is no good may take its process with it.
can_render() {
    "$python" - >"$root/.venv/can-render.log" 2>&1 <<'PYTHON'
import cv2  # ManiSkill imports it; it needs libraries of the system, as SAPIEN does
import sapien

scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem("cpu")])
camera = scene.add_camera("camera", 8, 8, 1.0, 0.01, 10.0)
scene.update_render()
camera.take_picture()
assert camera.get_picture("Color").shape == (8, 8, 4), cv2.__version__
PYTHON
}

set_up_renderer() {
    if [[ -f "$renderer_stamp" ]]; then return; fi
    echo "set-up: looking for a device that can render (a few seconds)"
    if ! can_render; then
        echo "set-up: there is none ($(tail -n 1 "$root/.venv/can-render.log"))"
        echo "set-up: installing a software Vulkan driver (Mesa, about a minute)"
        install_mesa
        can_render || stop "a Vulkan driver is installed, but rendering still fails; see $root/.venv/can-render.log"
    fi
    touch "$renderer_stamp"
}

os_release=/etc/os-release
# Mesa, and what SAPIEN and OpenCV need of a desktop that a server or a container does not have.
system_packages=(mesa-vulkan-drivers libx11-6 libgl1 libglib2.0-0)

install_mesa() {
    local id codename version source from=() backports=/etc/apt/sources.list.d/robofactory-backports.sources
    local by_hand="install a Vulkan driver, Mesa 24.3 or newer for rendering without a GPU, then run this again"
    command -v apt-get >/dev/null || stop "nothing here can render, and there is no apt-get; $by_hand"
    id="$(. "$os_release" && echo "$ID")"
    codename="$(. "$os_release" && echo "${VERSION_CODENAME:-}")"

    if [[ "$(id -u)" != 0 ]] && ! { command -v sudo >/dev/null && { [[ -t 0 ]] || sudo -n true 2>/dev/null; }; }; then
        stop "nothing here can render, and installing a Vulkan driver takes root. Run as root: bash $root/setup.sh"$'\n' \
            "or these commands, as root:"$'\n'"$(commands_by_hand "$id" "$codename")"
    fi

    update_lists
    version="$(mesa_version)"
    if ! is_new_enough "$version" && [[ "$codename" == bookworm && "$id" == debian ]]; then
        from=(-t bookworm-backports)
        if ! apt-get indextargets --format '$(RELEASE)' | grep -q -x bookworm-backports; then
            source="$(backports_source bookworm)" || exit 2
            echo "$source" | as_root tee "$backports" >/dev/null
            update_lists
        fi
        version="$(mesa_version "${from[@]}")"
    fi
    is_new_enough "$version" ||
        stop "nothing here can render, and $id $codename offers Mesa ${version:-nowhere}; 24.3 is needed; $by_hand"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${from[@]}" \
        "${system_packages[@]}" >"$root/.venv/apt.log" 2>&1 || {
        tail -n 5 "$root/.venv/apt.log" >&2
        stop "apt-get could not install Mesa $version; its last lines are above, all of them in $root/.venv/apt.log"
    }
    echo "set-up: Mesa $version installed"
}

as_root() { if [[ "$(id -u)" == 0 ]]; then "$@"; else sudo "$@"; fi; }

update_lists() { # a source that fails need not be the one that has Mesa
    as_root apt-get update -qq || echo "set-up: apt-get update complains, see above; going on with what it got"
}

mesa_version() { # [-t suite]: the version that apt-get would install
    LC_ALL=C apt-cache "$@" policy mesa-vulkan-drivers | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'
}

is_new_enough() { [[ -n "$1" ]] && dpkg --compare-versions "$1" ge 24.3; }

backports_source() { # codename: the same mirror and key as the codename's own packages, as a deb822 source
    local codename="$1" uri entry key
    IFS='|' read -r uri entry < <(
        apt-get indextargets --format '$(REPO_URI)|$(SOURCESENTRY)' \
            "Codename: $codename" 'Label: Debian' 'Component: main' 'Created-By: Packages'
    ) || stop "apt knows no source of Debian $codename to take backports from"
    printf 'Types: deb\nURIs: %s\nSuites: %s-backports\nComponents: main\n' "$uri" "$codename"
    key="$(sed -n -E 's/^Signed-By: *(\/.+)$/\1/p; s/^deb .*signed-by=([^] ]+).*/\1/p' "${entry%:*}" | head -n 1)"
    if [[ -n "$key" ]]; then printf 'Signed-By: %s\n' "$key"; fi
}

commands_by_hand() { # id codename: what an administrator would type
    local suite=""
    if [[ "$1" == debian && "$2" == bookworm ]]; then
        suite="-t bookworm-backports "
        printf "    cat >/etc/apt/sources.list.d/robofactory-backports.sources <<'END'\n%s\nEND\n" "$(backports_source "$2")"
    fi
    printf '    apt-get update\n    apt-get install %s%s\n' "$suite" "${system_packages[*]}"
}

# ------------------------------------------------------------------------------------------------------------- doors

set_up() { one_at_a_time set_up_packages set_up_renderer; }

set_up_without_renderer() { one_at_a_time set_up_packages; }

one_at_a_time() { # functions...: of two terminals the second waits for the first, and finds everything done
    if has_packages && { [[ -f "$renderer_stamp" || "$*" != *set_up_renderer* ]]; }; then return; fi
    trap 'printf "\ninterrupted; the same command continues\n" >&2; exit 130' INT
    exec 9<"$root"
    flock --nonblock 9 || { echo "set-up: waiting for another one to finish" && flock 9; }
    local each
    for each in "$@"; do "$each"; done
    exec 9<&-
    trap - INT
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    set -euo pipefail
    rm -f "$renderer_stamp" # who runs this by hand wants to know
    set_up
    echo "set-up: complete"
fi
