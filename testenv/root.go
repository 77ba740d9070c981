package testenv

import (
	"context"
	"crypto/sha256"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// tools are the programs that every guest has, with the package that brings them.
var tools = []struct{ program, pkg string }{
	{"ip", "iproute2"},
	{"bridge", "iproute2"},
	{"tc", "iproute2"},
	{"ss", "iproute2"},
	{"xtables-legacy-multi", "iptables"},
	{"xtables-nft-multi", "iptables"},
	{"nft", "nftables"},
	{"arptables-legacy", "arptables"},
	{"ebtables-legacy", "ebtables"},
	{"ebtables-legacy-restore", "ebtables"},
	{"conntrack", "conntrack"},
	{"ping", "iputils-ping"},
	{"tcpdump", "tcpdump"},
	{"dash", "dash"}, // busybox sh would run its own ip and ping
	{"kmod", "kmod"},
	{"taskset", "util-linux"},
	{"chrt", "util-linux"},
	{"unshare", "util-linux"},
	{"nsenter", "util-linux"},
	{"busybox", "busybox-static"},
}

// optionalTools come along where the machine has them.
var optionalTools = []string{"strace", "bpftool", "ethtool", "ipset", "bash"}

// A root is a file system that has the guest's programs.
type root struct {
	dir  string            // "" is the machine's own
	libs map[string]string // soname → file
}

// rootOf returns the root for a kernel's guests: the machine's own, or what packages hold.
func rootOf(ctx context.Context, k *Kernel, log io.Writer) (*root, error) {
	if k.Arch == "" {
		return machineRoot(ctx)
	}
	return packagesRoot(ctx, k, log)
}

// machineRoot finds shared libraries as the dynamic loader would: by the cache that
// ldconfig made.
func machineRoot(ctx context.Context) (*root, error) {
	ldconfig := "ldconfig"
	if _, err := exec.LookPath(ldconfig); err != nil {
		ldconfig = "/sbin/ldconfig" // a user's PATH may lack sbin
	}
	out, err := output(ctx, "", ldconfig, "-p")
	if err != nil {
		return nil, err
	}
	r := &root{libs: map[string]string{}}
	for line := range strings.SplitSeq(out, "\n") {
		//	libz.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libz.so.1
		name, rest, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok || !strings.Contains(rest, "x86-64") {
			continue
		}
		if _, p, ok := strings.Cut(rest, "=> "); ok && r.libs[name] == "" {
			r.libs[name] = p
		}
	}
	return r, nil
}

// packagesRoot unpacks the packages of tools, with all that they depend on, in the cache.
// Nothing of them is installed, and none of their programs is run. Where the archive cannot
// be reached, what was unpacked before is used and log is told so.
func packagesRoot(ctx context.Context, k *Kernel, log io.Writer) (*root, error) {
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	roots := filepath.Join(cache, "roots")
	if err := os.MkdirAll(roots, 0o755); err != nil {
		return nil, err
	}
	dir, err := unpackTools(ctx, k, cache, roots, log)
	if err != nil {
		if dir = newestDir(filepath.Join(roots, k.Arch+"-*")); dir == "" || ctx.Err() != nil {
			return nil, fmt.Errorf("programs for %s: %w", k.Arch, err)
		}
		fmt.Fprintf(log, "vm: using the cached programs for %s: %v\n", k.Arch, err)
	}
	r := &root{dir: dir, libs: map[string]string{}}
	for _, pattern := range []string{"lib/*-linux-gnu*/*.so*", "usr/lib/*-linux-gnu*/*.so*"} {
		libs, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return nil, err
		}
		for _, l := range libs {
			r.libs[filepath.Base(l)] = strings.TrimPrefix(l, dir)
		}
	}
	return r, nil
}

func unpackTools(ctx context.Context, k *Kernel, cache, roots string, log io.Writer) (string, error) {
	a, err := sourceOf(k.Name).apt(ctx, cache, log)
	if err != nil {
		return "", err
	}
	args := []string{"-q", "--simulate", "--no-install-recommends", "install"}
	for _, t := range tools {
		args = append(args, t.pkg)
	}
	out, err := a.run(ctx, "", "apt-get", args...)
	if err != nil {
		return "", err
	}
	packages := simulated(out)
	if len(packages) == 0 {
		return "", errors.New("apt-get does not tell which packages it would install")
	}
	sum := sha256.Sum256([]byte(strings.Join(packages, " ")))
	dir := filepath.Join(roots, fmt.Sprintf("%s-%x", k.Arch, sum[:8]))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	fmt.Fprintf(log, "vm: fetching %d packages for %s\n", len(packages), k.Arch)
	return dir, a.unpack(ctx, packages, dir)
}

// simulated returns as NAME=VERSION what apt-get --simulate install would install.
func simulated(out string) []string {
	var packages []string
	for line := range strings.Lines(out) {
		// Inst libc6 (2.36-9+deb12u13 Debian:12.12/oldstable [arm64]) []
		f := strings.Fields(line)
		if len(f) > 2 && f[0] == "Inst" && strings.HasPrefix(f[2], "(") {
			packages = append(packages, f[1]+"="+f[2][1:])
		}
	}
	slices.Sort(packages)
	return packages
}

// newestDir returns "" if there is none.
func newestDir(pattern string) string {
	dirs, _ := filepath.Glob(pattern)
	newest := ""
	var at int64
	for _, d := range dirs {
		if st, err := os.Stat(d); err == nil && (newest == "" || st.ModTime().UnixNano() > at) {
			newest, at = d, st.ModTime().UnixNano()
		}
	}
	return newest
}

// find returns a program's path in the root.
func (r *root) find(program string) (string, error) {
	if r.dir == "" {
		p, err := exec.LookPath(program)
		if err != nil {
			return "", err
		}
		return filepath.EvalSymlinks(p)
	}
	for _, d := range []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		p := r.resolve(filepath.Join(d, program))
		if _, err := os.Stat(r.dir + p); err == nil {
			return p, nil
		}
	}
	return "", &exec.Error{Name: program, Err: exec.ErrNotFound}
}

// resolve follows a path's symbolic links within the root.
func (r *root) resolve(p string) string {
	for range 40 { // MAXSYMLINKS, include/linux/namei.h
		target, err := os.Readlink(r.dir + p)
		if err != nil {
			break
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(p), target)
		}
		p = target
	}
	return p
}

// files lists what the guest gets of the root: guest path → path on this machine.
func (r *root) files() (map[string]string, error) {
	files := map[string]string{}
	// Of ebtables-legacy, by its RUNPATH.
	r.libs["libebtc.so.0"] = "/usr/lib/ebtables/libebtc.so.0"
	var missing []string
	add := func(program string) error {
		p, err := r.find(program)
		if err != nil {
			return err
		}
		return r.add(files, "/usr"+strings.TrimPrefix(p, "/usr"), p)
	}
	for _, t := range tools {
		if err := add(t.program); errors.Is(err, exec.ErrNotFound) {
			missing = append(missing, t.pkg)
		} else if err != nil {
			return nil, err
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		names := strings.Join(slices.Compact(missing), " ")
		if r.dir != "" {
			return nil, fmt.Errorf("the guest needs programs that are not in these packages: %s; remove %s and try again", names, r.dir)
		}
		return nil, fmt.Errorf("the guest needs programs that this machine lacks: make setup installs %s", names)
	}
	if err := static(files["/usr/bin/busybox"]); err != nil {
		return nil, err
	}
	for _, t := range optionalTools {
		if err := add(t); err != nil && !errors.Is(err, exec.ErrNotFound) {
			return nil, err
		}
	}
	// The programs load these by name at run time.
	exts, err := filepath.Glob(r.dir + "/usr/lib/*/xtables/*.so")
	if err != nil {
		return nil, err
	}
	for _, e := range exts {
		p := strings.TrimPrefix(e, r.dir)
		if err := r.add(files, p, p); err != nil {
			return nil, err
		}
	}
	for _, f := range []string{"/etc/protocols", "/etc/services", "/etc/ethertypes", "/etc/iproute2/rt_dsfield", "/etc/iproute2/rt_protos",
		"/etc/iproute2/rt_tables", "/etc/iproute2/rt_scopes", "/etc/iproute2/group"} {
		if _, err := os.Stat(r.dir + f); err == nil {
			files[f] = r.dir + f
		}
	}
	return files, nil
}

// static returns an error for a busybox that needs libraries.
func static(busybox string) error {
	f, err := elf.Open(busybox)
	if err != nil {
		return err
	}
	defer f.Close()
	libs, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", busybox, err)
	}
	if len(libs) > 0 {
		return fmt.Errorf("%s is not static: install the package busybox-static", busybox)
	}
	return nil
}

// add puts an ELF file, with its path in the root, and all libraries that it needs into files.
func (r *root) add(files map[string]string, guest, name string) error {
	if files[guest] != "" {
		return nil
	}
	host := r.dir + name
	files[guest] = host
	f, err := elf.Open(host)
	if err != nil {
		if bad := (*elf.FormatError)(nil); errors.As(err, &bad) {
			return nil // a script
		}
		return err
	}
	defer f.Close()
	needed, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", host, err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			b, err := io.ReadAll(p.Open())
			if err != nil {
				return fmt.Errorf("%s: %w", host, err)
			}
			interp := strings.TrimRight(string(b), "\x00")
			files[merged(interp)] = r.dir + interp
		}
	}
	for _, n := range needed {
		p := r.libs[n]
		if p == "" {
			return fmt.Errorf("%s needs the library %s, which is not there", host, n)
		}
		if err := r.add(files, merged(p), p); err != nil {
			return err
		}
	}
	return nil
}

// merged gives the place of a library in a system with merged /usr.
func merged(p string) string {
	if strings.HasPrefix(p, "/lib") {
		return "/usr" + p
	}
	return p
}
