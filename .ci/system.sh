# Sourced by .ci/setup: the interpreter, compilers and libraries of the machine. Checks by using them, not by asking a package manager.

APT_LINE="apt-get install -y gcc g++ gfortran pkg-config libopenblas-dev libxc-dev libfftw3-dev python3-venv python3-dev"
DNF_LINE="dnf install -y gcc gcc-c++ gcc-gfortran pkgconf-pkg-config openblas-devel libxc-devel fftw-devel python3.11-devel"
CONDA_LINE="conda install -y -c conda-forge python=3.11 gcc gxx gfortran pkg-config openblas libxc fftw"

usable_python() { # 3.11 to 3.13, and able to make virtual environments
    "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' > /dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        usable_python "$PYTHON" || { [ "$(id -u)" = 0 ] && apt_python && usable_python "$PYTHON"; } ||
            fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13 with the modules venv and ensurepip"
        PYTHON=$(command -v "$PYTHON")
        return
    fi
    for _ in once again; do
        for candidate in python3.11 python3.12 python3.13 python3; do
            if command -v "$candidate" > /dev/null && usable_python "$candidate"; then
                PYTHON=$(command -v "$candidate")
                return
            fi
        done
        { [ "$(id -u)" = 0 ] && apt_python; } || break
    done
    fail "no Python 3.11, 3.12 or 3.13 with the modules venv and ensurepip" "Debian, Ubuntu: sudo $APT_LINE" \
        "Fedora:         sudo $DNF_LINE" "conda:          conda create -n csp -c conda-forge python=3.11 && conda activate csp" \
        "or give one: make PYTHON=/path/to/python3.11 ..."
}

apt_python() {
    command -v apt-get > /dev/null || return 1
    say "installing Python's venv with apt-get"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq python3 python3-venv python3-dev; } > /dev/null 2>&1
}

has_library() { # has_library NAME HEADER LIBRARY: by pkg-config, else by compiling two lines
    pkg-config --exists "$1" 2> /dev/null && return 0
    command -v gcc > /dev/null || return 1
    printf '#include <%s>\nint main(void) { return 0; }\n' "$2" | gcc ${CPPFLAGS:-} -x c - ${LDFLAGS:-} "-l$3" -o /dev/null 2> /dev/null
}

has_python_headers() {
    local include
    include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    [ -e "$include/Python.h" ]
}

missing_parts() {
    local tool
    for tool in gcc g++ gfortran pkg-config; do
        command -v "$tool" > /dev/null || echo "$tool"
    done
    has_library openblas cblas.h openblas || echo "OpenBLAS (headers)"
    has_library libxc xc.h xc || echo "libxc (headers)"
    has_python_headers || echo "Python.h of $PYTHON"
}

check_system() {
    local missing log
    missing=$(missing_parts | paste -sd, | sed 's/,/, /g')
    [ -z "$missing" ] && return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        say "missing on this machine: $missing; installing with apt-get"
        log=$(mktemp)
        if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive ${APT_LINE/apt-get/apt-get -o DPkg::Lock::Timeout=300} -qq; } > "$log" 2>&1; then
            tail -n 15 "$log" >&2
            fail "apt-get could not install them" "the line was: $APT_LINE"
        fi
        rm -f "$log"
        missing=$(missing_parts | paste -sd, | sed 's/,/, /g')
        [ -z "$missing" ] && return 0
    fi
    fail "missing on this machine: $missing" "install them with the line for your system, then call make again:" \
        "Debian, Ubuntu: sudo $APT_LINE" "Fedora:         sudo $DNF_LINE" "conda:          $CONDA_LINE"
}

has_cuda() { command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q GPU; }

write_gpaw_siteconfig() { # serial GPAW: labels run side by side, one process each
    local libraries="'xc', 'openblas'" directories="" includes="" item
    if has_library fftw3 fftw3.h fftw3; then
        libraries="$libraries, 'fftw3'"
        echo "fftw = True"
    fi
    for item in $(pkg-config --libs-only-L libxc openblas fftw3 2> /dev/null); do directories="$directories'${item#-L}', "; done
    for item in $(pkg-config --cflags-only-I libxc openblas fftw3 2> /dev/null); do includes="$includes'${item#-I}', "; done
    printf 'mpi = False\nlibraries = [%s]\n' "$libraries"
    printf 'library_dirs += [%s]\nruntime_library_dirs += [%s]\ninclude_dirs += [%s]\n' "$directories" "$directories" "$includes"
}
