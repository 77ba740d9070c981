package testenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
)

// kernelPackages is the table of kernels: the name they are asked for by, and
// the pattern of the Debian packages that hold them. The newest package that
// the machine's package index knows is taken. The signed and the unsigned
// package hold the same kernel; an index may know only one of them.
var kernelPackages = []struct {
	name    string
	pattern *regexp.Regexp
}{
	{"6.12", regexp.MustCompile(`^linux-image-6\.12\.[0-9]+\+deb[0-9]+-cloud-amd64(-unsigned)?$`)},
	{"6.1", regexp.MustCompile(`^linux-image-6\.1\.0-[0-9]+-cloud-amd64(-unsigned)?$`)},
}

// KernelNames returns the names that Kernel knows.
func KernelNames() []string {
	var names []string
	for _, k := range kernelPackages {
		names = append(names, k.name)
	}
	return names
}

// Kernel is an unpacked kernel package.
type Kernel struct {
	Name    string // as asked for: "6.12"
	Package string // linux-image-6.12.117+deb12-cloud-amd64
	Version string // the package's version
	Release string // what uname -r says in it
	Dir     string // the unpacked package
}

// Image is the path of the kernel image on the host.
func (k *Kernel) Image() string { return filepath.Join(k.Dir, "boot", "vmlinuz-"+k.Release) }

// Modules is the path of the kernel's module directory on the host.
func (k *Kernel) Modules() string {
	// With merged /usr, new packages ship usr/lib/modules.
	for _, d := range []string{"lib/modules", "usr/lib/modules"} {
		p := filepath.Join(k.Dir, d, k.Release)
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return filepath.Join(k.Dir, "lib/modules", k.Release)
}

// CacheDir returns the directory for kernels and initramfs archives:
// $NFTRACE_CACHE, or nftrace below $XDG_CACHE_HOME or ~/.cache.
func CacheDir() (string, error) {
	if d := os.Getenv("NFTRACE_CACHE"); d != "" {
		return filepath.Abs(d)
	}
	d, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("%w: set NFTRACE_CACHE to a directory for kernels", err)
	}
	return filepath.Join(d, "nftrace"), nil
}

// FindKernel returns the kernel of that name, fetching and unpacking its
// package if it is not in the cache. Where the archive has nothing or cannot be
// reached, a kernel cached before is used and log is told so; if there is none, root
// has the machine's package index brought up to date first.
func FindKernel(ctx context.Context, name string, log io.Writer) (*Kernel, error) {
	var pattern *regexp.Regexp
	for _, k := range kernelPackages {
		if k.name == name {
			pattern = k.pattern
		}
	}
	if pattern == nil {
		return nil, fmt.Errorf("no kernel %q: there are %s", name, strings.Join(KernelNames(), ", "))
	}
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	cache = filepath.Join(cache, "kernels")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}

	k, err := newestKernel(ctx, name, pattern, cache, log)
	if err == nil {
		return k, nil
	}
	if k := newestCached(ctx, name, pattern, cache); k != nil && ctx.Err() == nil {
		fmt.Fprintf(log, "vm: using the cached %s %s: %v\n", k.Package, k.Version, err)
		return k, nil
	}
	// A new machine's index may be old, incomplete or empty.
	if os.Geteuid() == 0 && ctx.Err() == nil {
		fmt.Fprintf(log, "vm: running apt-get update: %v\n", err)
		if _, err := output(ctx, "", "apt-get", "-q", "update"); err != nil {
			return nil, err
		}
		k, err = newestKernel(ctx, name, pattern, cache, log)
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return k, err
}

// newestKernel returns the kernel in the newest package that the index has.
func newestKernel(ctx context.Context, name string, pattern *regexp.Regexp, cache string, log io.Writer) (*Kernel, error) {
	pkg, version, err := newestPackage(ctx, pattern)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, pkg+"_"+version)
	if _, err := os.Stat(dir); err != nil {
		fmt.Fprintf(log, "vm: fetching %s %s\n", pkg, version)
		if err := fetchPackage(ctx, pkg, version, dir); err != nil {
			return nil, err
		}
	}
	return openKernel(name, pkg, version, dir)
}

func openKernel(name, pkg, version, dir string) (*Kernel, error) {
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil {
		return nil, err
	}
	if len(images) != 1 {
		return nil, fmt.Errorf("%s: %d kernel images where one was expected; remove the directory and try again", dir, len(images))
	}
	return &Kernel{
		Name: name, Package: pkg, Version: version, Dir: dir,
		Release: strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-"),
	}, nil
}

// newestPackage asks the machine's package index.
func newestPackage(ctx context.Context, pattern *regexp.Regexp) (pkg, version string, err error) {
	prefix, _ := pattern.LiteralPrefix()
	if prefix == "" {
		prefix = "linux-image-"
	}
	out, err := output(ctx, "", "apt-cache", "pkgnames", prefix)
	if err != nil {
		return "", "", err
	}
	var names []string
	for _, n := range strings.Fields(out) {
		if pattern.MatchString(n) {
			names = append(names, n)
		}
	}
	if len(names) == 0 {
		return "", "", fmt.Errorf("no package matches %s: run apt-get update, or add the suite that has it to apt's sources", pattern)
	}
	sort.Strings(names)
	out, err = output(ctx, "", "apt-cache", append([]string{"show", "--no-all-versions"}, names...)...)
	if err != nil {
		return "", "", err
	}
	for para := range strings.SplitSeq(out, "\n\n") {
		p, v := field(para, "Package"), field(para, "Version")
		// A virtual or removed package has no paragraph of its own.
		if !pattern.MatchString(p) || v == "" || field(para, "Filename") == "" {
			continue
		}
		// At the same version the signed package is kept: it sorts first.
		if version == "" || newer(ctx, v, version) {
			pkg, version = p, v
		}
	}
	if pkg == "" {
		return "", "", fmt.Errorf("no package that matches %s can be downloaded: run apt-get update", pattern)
	}
	return pkg, version, nil
}

// field returns a field of a paragraph in Debian's control format.
func field(para, name string) string {
	for line := range strings.SplitSeq(para, "\n") {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func newer(ctx context.Context, a, b string) bool {
	return exec.CommandContext(ctx, "dpkg", "--compare-versions", a, "gt", b).Run() == nil
}

// fetchPackage downloads a package and unpacks it as dir. The directory appears
// complete or not at all.
func fetchPackage(ctx context.Context, pkg, version, dir string) error {
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".fetch-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	args := []string{"-q", "download", pkg + "=" + version}
	if os.Geteuid() == 0 {
		// apt's own user need not be able to write to root's cache.
		args = append([]string{"-o", "APT::Sandbox::User=root"}, args...)
	}
	if _, err := output(ctx, tmp, "apt-get", args...); err != nil {
		return fmt.Errorf("%w; if the package index is old, run apt-get update", err)
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil {
		return err
	}
	if len(debs) != 1 {
		return fmt.Errorf("apt-get download %s left %d files where one was expected", pkg, len(debs))
	}
	tree := filepath.Join(tmp, "tree")
	if _, err := output(ctx, tmp, "dpkg", "-x", debs[0], tree); err != nil {
		return err
	}
	if err := os.Chmod(tree, 0o755); err != nil {
		return err
	}
	err = os.Rename(tree, dir)
	if errors.Is(err, os.ErrExist) {
		return nil // another vm was faster
	}
	return err
}

func newestCached(ctx context.Context, name string, pattern *regexp.Regexp, cache string) *Kernel {
	entries, err := os.ReadDir(cache)
	if err != nil {
		return nil
	}
	var best *Kernel
	for _, e := range entries {
		pkg, version, ok := strings.Cut(e.Name(), "_")
		if !ok || !pattern.MatchString(pkg) || best != nil && !newer(ctx, version, best.Version) {
			continue
		}
		if k, err := openKernel(name, pkg, version, filepath.Join(cache, e.Name())); err == nil {
			best = k
		}
	}
	return best
}

// output runs a program and returns what it wrote; its error carries stderr.
func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return "", fmt.Errorf("%w; make setup installs what is missing", err)
		}
		return "", fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}
